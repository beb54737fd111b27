#!/usr/bin/env bash
# The whole path on a cluster of its own: kind, Kubeflow Pipelines, MLflow and approvals of deploy/, the small pipeline,
# a reviewer's approval, production. .github/workflows/end-to-end.yaml runs it; by hand, after `make setup`:
#
#   PATH=$PWD/.venv/bin:$PATH scripts/end-to-end.sh
#
# KEEP=1 leaves the cluster, and says how to use it; KFP_PORT and MLFLOW_PORT are the ports of this machine that it takes,
# 8888 and 5000. It needs docker, kind, kubectl and openssl, and should do with 4 CPUs, 12 GiB of memory and 30 GB of disk.
# It touches the cluster kind-adfm only, which it makes and deletes; where there is one already, it does not begin.
#
# NOT RUN where it was written, for want of a cluster. tests/registry/test_end_to_end.py runs it with stand-ins for docker,
# kind, kubectl and KFP, and all else real: MLflow, its users, submission, approval, promotion.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

kfp=2.17.0
cluster=adfm
image=docker.io/library/adfm:end-to-end # a tag that is not `latest`: nodes take what was loaded, and pull nothing
kfp_port=${KFP_PORT:-8888}
mlflow_port=${MLFLOW_PORT:-5000}
api=http://127.0.0.1:$kfp_port
work=$(mktemp -d)
export KUBECONFIG="$work/kubeconfig" # so that no other cluster can be meant
export MLFLOW_TRACKING_URI=http://127.0.0.1:$mlflow_port
forwards=()

main() {
  for program in docker kind kubectl openssl python; do
    command -v "$program" >/dev/null || refuse "$program is missing"
  done
  # One that is kept is not this run's to delete.
  if kind get clusters 2>/dev/null | grep -x "$cluster" >/dev/null; then
    refuse "there is a cluster $cluster already; remove it first: kind delete cluster --name $cluster"
  fi
  trap end EXIT
  step 'images and cluster' make_cluster
  step "Kubeflow Pipelines $kfp" install_kubeflow
  step 'keys and secrets' make_secrets
  step 'MLflow and approvals' install_server
  step 'users and policy' make_users
  step 'a run' run_pipeline
  step 'approval' approve
  echo "==> the version is in production after $SECONDS s"
}

refuse() {
  echo "$0: $1" >&2
  rmdir "$work"
  exit 1
}

step() {
  echo "==> $1 (after $SECONDS s)"
  "$2"
}

make_cluster() {
  docker image inspect localhost/adfm:cpu >/dev/null 2>&1 || make image BUILDER=docker TARGETS=cpu
  docker tag localhost/adfm:cpu "$image"
  kind create cluster --name "$cluster" --wait 5m
  kind load docker-image "$image" --name "$cluster"
}

install_kubeflow() {
  local manifests=github.com/kubeflow/pipelines/manifests/kustomize
  kubectl apply -k "$manifests/cluster-scoped-resources?ref=$kfp"
  kubectl wait --for=condition=established --timeout=2m crd/applications.app.k8s.io crd/workflows.argoproj.io
  kubectl apply -k "$manifests/env/platform-agnostic?ref=$kfp"
  for deployment in mysql seaweedfs metadata-grpc-deployment workflow-controller ml-pipeline; do
    kubectl -n kubeflow rollout status --timeout=15m "deployment/$deployment"
  done
  # KFP lets its own namespace and profiles reach its object store, where MLflow's files go here.
  kubectl apply -f - <<'END'
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: seaweedfs-for-adfm
  namespace: kubeflow
spec:
  podSelector:
    matchLabels:
      app: seaweedfs
  policyTypes: [Ingress]
  ingress:
    - from:
        - namespaceSelector:
            matchLabels:
              kubernetes.io/metadata.name: adfm
      ports:
        - port: 8333
END
  forward kubeflow svc/ml-pipeline "$kfp_port:8888" "$api/apis/v2beta1/healthz"
}

make_secrets() {
  local role
  umask 077
  mkdir -p "$work/keys/submitters" "$work/keys/service"
  for role in submitters/runs service/approvals; do
    openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$work/${role#*/}-private.pem"
    openssl pkey -in "$work/${role#*/}-private.pem" -pubout -out "$work/keys/$role.pem"
  done
  for role in ADMIN APPROVALS PIPELINE CARLA; do
    export "ADFM_PASSWORD_$role=$(openssl rand -hex 16)"
  done
  kubectl create namespace adfm
  kubectl -n adfm create secret generic adfm-server \
    --from-literal=postgres-password="$(openssl rand -hex 16)" \
    --from-literal=admin-password="$ADFM_PASSWORD_ADMIN" \
    --from-literal=flask-secret-key="$(openssl rand -hex 32)" \
    --from-literal=service-password="$ADFM_PASSWORD_APPROVALS" \
    --from-literal=ui="$MLFLOW_TRACKING_URI" \
    --from-literal=artifacts=s3://mlpipeline/mlflow \
    --from-literal=s3-endpoint=http://seaweedfs.kubeflow:8333 \
    --from-literal=s3-access-key="$(of_kubeflow accesskey)" \
    --from-literal=s3-secret-key="$(of_kubeflow secretkey)"
  kubectl -n adfm create secret generic adfm-signing --from-file=private.pem="$work/approvals-private.pem"
  kubectl -n kubeflow create secret generic adfm-signing --from-file=private.pem="$work/runs-private.pem" \
    --from-literal=folder=/etc/adfm/keys
  kubectl -n kubeflow create secret generic adfm-mlflow --from-literal=uri=http://mlflow.adfm:5000 \
    --from-literal=ui="$MLFLOW_TRACKING_URI" --from-literal=username=pipeline \
    --from-literal=password="$ADFM_PASSWORD_PIPELINE"
  for namespace in adfm kubeflow; do
    kubectl -n "$namespace" create configmap adfm-submitters --from-file="$work/keys/submitters/"
    kubectl -n "$namespace" create configmap adfm-service --from-file="$work/keys/service/"
  done
}

of_kubeflow() {
  kubectl -n kubeflow get secret mlpipeline-minio-artifact -o "jsonpath={.data.$1}" | base64 --decode
}

install_server() {
  cp -R deploy "$work/deploy"
  cat >"$work/deploy/server/image/kustomization.yaml" <<END
apiVersion: kustomize.config.k8s.io/v1alpha1
kind: Component
images:
  - name: localhost/adfm
    newName: ${image%:*}
    newTag: ${image##*:}
END
  kubectl apply -k "$work/deploy/server"
  kubectl apply -k "$work/deploy/server/upgrade"
  kubectl apply -k "$work/deploy/runs"
  kubectl -n adfm wait --for=condition=complete --timeout=15m job/upgrade
  kubectl -n adfm rollout restart deployment/mlflow # it has waited for the tables, with growing pauses
  kubectl -n adfm rollout status --timeout=10m deployment/mlflow
  forward adfm svc/mlflow "$mlflow_port:5000" "$MLFLOW_TRACKING_URI/health"
}

make_users() {
  as admin "$ADFM_PASSWORD_ADMIN" python scripts/set-up-roles.py \
    --service approvals --submitter pipeline --reviewer carla
  python -c 'from tests.small import SMALL_POLICY; print(SMALL_POLICY)' >"$work/policy.yaml" # a tiny model fulfils it
  as carla "$ADFM_PASSWORD_CARLA" python -m adfm policy set "$work/policy.yaml"
  kubectl -n adfm rollout status --timeout=10m deployment/approvals
}

run_pipeline() {
  local settings
  mapfile -t settings < <(python -c 'from tests.small import SMALL; print(*SMALL, sep="\n")')
  # No GPU is asked for, so that the image for CPUs does for all; and pods fit a small machine.
  ADFM_CPU_IMAGE=$image ADFM_GPU_IMAGE=$image python - submit --host "$api" "${settings[@]/#/--set=}" <<'END'
import runpy

from adfm.kubeflow.resources import RESOURCES

RESOURCES.update({task: entry._replace(cpu="500m", memory="3Gi") for task, entry in RESOURCES.items()})
runpy.run_module("pipelines.training", run_name="__main__")
END
  python - "$api" <<'END'
import sys

import kfp

client = kfp.Client(sys.argv[1], namespace="kubeflow")
experiment = client.get_experiment(experiment_name="adfm").experiment_id
run = client.list_runs(experiment_id=experiment, sort_by="created_at desc", page_size=1).runs[0]
done = client.wait_for_run_completion(run.run_id, timeout=3600, sleep_duration=10)
print(f"run {done.run_id}: {done.state}, {(done.finished_at - done.created_at).total_seconds():.0f} s")
sys.exit(done.state != "SUCCEEDED")
END
}

approve() {
  local version tries
  version=$(as carla "$ADFM_PASSWORD_CARLA" python -c '
from mlflow import MlflowClient
print(max(int(version.version) for version in MlflowClient().search_model_versions("name = '"'adfm'"'")))')
  as carla "$ADFM_PASSWORD_CARLA" python -m adfm approve "$version" --reason 'end to end'
  for tries in {60..0}; do # the service looks every 5 s
    as carla "$ADFM_PASSWORD_CARLA" python -c '
import sys
from mlflow import MlflowClient
sys.exit(MlflowClient().get_registered_model("adfm").aliases.get("production") != sys.argv[1])' "$version" && break
    [ "$tries" -gt 0 ] || { echo "$0: version $version is approved and not in production" >&2; return 1; }
    sleep 5
  done
  as carla "$ADFM_PASSWORD_CARLA" python -m adfm audit
}

# as USER PASSWORD COMMAND...: with a login at MLflow, and the public keys alone
as() {
  ADFM_KEYS="$work/keys" MLFLOW_TRACKING_USERNAME=$1 MLFLOW_TRACKING_PASSWORD=$2 "${@:3}"
}

# forward NAMESPACE SERVICE PORTS URL: keeps a port of this machine forwarded, also after a pod was replaced
forward() {
  local tries log=$work/forward-${3%:*}
  while kubectl -n "$1" port-forward "$2" "$3" || true; do sleep 1; done >"$log" 2>&1 &
  forwards+=($!)
  for tries in {10..0}; do # until it says where it listens; a port that is taken may be that of another cluster
    [ ! -s "$log" ] || break
    sleep 1
  done
  if grep -Eqi 'unable to listen|from \[::1\]' "$log" && ! grep -qF 'from 127.0.0.1' "$log"; then
    echo "$0: port ${3%:*} of this machine is taken; name another in KFP_PORT or MLFLOW_PORT" >&2
    return 1
  fi
  for tries in {60..0}; do
    python -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' "$4" 2>/dev/null && return
    [ "$tries" -gt 0 ] || { cat "$log" >&2; return 1; }
    sleep 2
  done
}

end() {
  local status=$?
  if [ $status -ne 0 ]; then
    {
      kubectl get pods --all-namespaces --output wide
      kubectl get events --all-namespaces --field-selector type=Warning --sort-by .lastTimestamp | tail -n 40
      for deployment in mlflow approvals; do
        kubectl -n adfm logs "deployment/$deployment" --all-containers --prefix --tail 60
      done
      kubectl -n adfm logs job/upgrade --all-containers --prefix --tail 60
      kubectl -n kubeflow get pods --field-selector status.phase=Failed --output name |
        xargs -r -n 1 kubectl -n kubeflow logs --container main --prefix --tail 60
    } >&2 || true
  fi
  for process in "${forwards[@]}"; do
    pkill -P "$process" || true
    kill "$process" || true
  done
  if [ "${KEEP-}" ]; then
    echo "the cluster is there: export KUBECONFIG=$KUBECONFIG; kind delete cluster --name $cluster" >&2
    return
  fi
  kind delete cluster --name "$cluster" || true
  rm -rf "$work"
}

main "$@"
