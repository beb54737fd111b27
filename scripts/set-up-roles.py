#!/usr/bin/env python3
"""Set up MLflow's users and roles. An administrator of an MLflow server with basic-auth runs it; it is safe to repeat.

    export MLFLOW_TRACKING_URI=http://localhost:5000 MLFLOW_TRACKING_USERNAME=admin MLFLOW_TRACKING_PASSWORD=…
    scripts/set-up-roles.py --service approvals --submitter pipeline --reviewer carla dora --reader anna

It makes the experiment and the two registered models, so that nobody else can make them first and own them, the roles
with their permissions, and the users who are not there yet. A user has one role: the last one given. A new user's
password is in `ADFM_PASSWORD_<NAME>` (`ADFM_PASSWORD_CARLA`), or is generated and printed once; where the variable is
set for a user who is there, that is the new password. In the end it prints what every user may do, and status 1 says
that somebody may do more than a role allows.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import sys
import warnings
from collections.abc import Mapping
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what MLflow's server imports; nobody here can do anything about it
    from mlflow.server.auth.client import AuthServiceClient
    from mlflow.server.auth.permissions import PERMISSION_PRIORITY
    from mlflow.server.auth.routes import LIST_USER_PERMISSIONS, LIST_USERS

# On the experiment, the registered model and its history. EDIT on a model covers tags and aliases alike, so whoever may
# approve may not write the history; deleting a tag or an alias takes MANAGE. docs/server.md has the whole table.
ROLES = {
    "service": ("EDIT", "MANAGE", "MANAGE"),
    "submitter": ("EDIT", "READ", "READ"),
    "reviewer": ("READ", "EDIT", "READ"),
    "reader": ("READ", "READ", "READ"),
}
# Permissions on these hold for every model and experiment and outweigh those above.
PARTS = ("registered_model_version", "logged_model", "run")
WORKSPACE = "default"  # that of a server without workspaces


Resources = tuple[tuple[str, str], ...]


class NotSetUp(Exception):
    """What is wrong and what to do; nothing else was changed."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for role in ROLES:
        parser.add_argument(f"--{role}", nargs="+", default=[], metavar="USER", help=f"users who get the role {role}")
    parser.add_argument("--model", default="adfm", help="the registered model (mlflow.registered_model)")
    parser.add_argument("--experiment", default="adfm", help="the experiment (mlflow.experiment)")
    options = vars(parser.parse_args())
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    try:
        if not uri.startswith("http"):
            raise NotSetUp("set MLFLOW_TRACKING_URI to the server's address; there are no users without a server.")
        users = roles_of_users({role: options[role] for role in ROLES})
        return set_up(uri, users, options["model"], options["experiment"])
    except NotSetUp as error:
        print(f"set-up-roles: {error}", file=sys.stderr)
    except MlflowException as error:
        print(f"set-up-roles: MLflow at {uri} failed: {error.message}", file=sys.stderr)
    return 2


def roles_of_users(users: Mapping[str, list[str]]) -> dict[str, str]:
    roles: dict[str, str] = {}
    for role, members in users.items():
        for user in members:
            if roles.setdefault(user, role) != role:
                raise NotSetUp(f"{user} is named as {roles[user]} and as {role}; a user has one role.")
    return roles


def set_up(uri: str, users: Mapping[str, str], model: str, experiment: str) -> int:
    auth, store = AuthServiceClient(uri), MlflowClient(uri)
    administrators = {user["username"] for user in all_users(auth) if user["is_admin"]}
    if wrong := sorted(administrators & users.keys()):
        raise NotSetUp(f"{', '.join(wrong)}: MLflow checks no permission of an administrator; name other users.")
    make_models(store, model)
    resources = (
        ("experiment", make_experiment(store, experiment)),
        ("registered_model", model),
        ("registered_model", f"{model}-history"),
    )
    role_ids = {
        role: make_role(auth, f"{model}-{role}", dict(zip(resources, permissions, strict=True)))
        for role, permissions in ROLES.items()
    }
    for user, role in users.items():
        make_user(auth, user)
        give_role(auth, user, role_ids, role)
        revoke_own_grants(auth, user, resources)
    return report(auth, role_ids, resources)


def all_users(auth: AuthServiceClient) -> list[dict[str, Any]]:
    """Every user, as the administrator sees them."""
    try:
        users: list[dict[str, Any]] = auth._request(LIST_USERS, "GET")["users"]
    except MlflowException as error:
        if error.get_http_status_code() == 404:
            raise NotSetUp(
                f"MLflow at {auth.tracking_uri} has no users; start it with --app-name basic-auth."
            ) from error
        if "error code 401" in error.message:
            raise NotSetUp(
                f"MLflow at {auth.tracking_uri} knows no such user and password; set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD to an administrator's."
            ) from error
        raise
    me = os.environ.get("MLFLOW_TRACKING_USERNAME", "")
    if not any(user["username"] == me and user["is_admin"] for user in users):
        raise NotSetUp(f"{me or 'nobody'} is not an administrator; set MLFLOW_TRACKING_USERNAME and _PASSWORD to one.")
    return users


def make_models(store: MlflowClient, model: str) -> None:
    for name in (model, f"{model}-history"):
        try:
            store.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        try:
            store.get_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            # Anybody may make a prompt; names are shared, and permissions on a model do not hold for it.
            raise NotSetUp(
                f"the name {name} is taken by a prompt; delete that, or remove the tag mlflow.prompt.is_prompt if it "
                "is the model after all."
            ) from error


def make_experiment(store: MlflowClient, name: str) -> str:
    if there := store.get_experiment_by_name(name):
        if there.lifecycle_stage == "deleted":
            raise NotSetUp(
                f"the experiment {name!r} was deleted; `mlflow experiments restore --experiment-id "
                f"{there.experiment_id}` brings it back, --experiment takes another."
            )
        return str(there.experiment_id)
    return str(store.create_experiment(name))


def make_role(auth: AuthServiceClient, name: str, permissions: Mapping[tuple[str, str], str]) -> int:
    """The id of the role `name`, which has these permissions and no other."""
    roles = {role.name: role for role in auth.list_roles(WORKSPACE)}
    role = roles[name] if name in roles else auth.create_role(WORKSPACE, name, "Made by adfm's set-up-roles.py")
    rows = {(row.resource_type, row.resource_pattern): row for row in auth.list_role_permissions(role.id)}
    for resource, row in rows.items():
        if row.permission != permissions.get(resource):
            auth.remove_role_permission(row.id)
    for resource, permission in permissions.items():
        if resource not in rows or rows[resource].permission != permission:
            auth.add_role_permission(role.id, *resource, permission)
    return int(role.id)


def make_user(auth: AuthServiceClient, user: str) -> None:
    variable = f"ADFM_PASSWORD_{re.sub(r'[^A-Z0-9]', '_', user.upper())}"
    password = os.environ.get(variable, "")
    try:
        auth.create_user(user, password or (generated := secrets.token_urlsafe(18)))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise NotSetUp(f"{user} ({variable}): {error.message}") from error
        if password:
            auth.update_user_password(user, password)
            print(f"changed the password of {user}")
    else:
        print(f"made {user}" + ("" if password else f", password {generated}"), flush=True)


def give_role(auth: AuthServiceClient, user: str, role_ids: Mapping[str, int], role: str) -> None:
    held = {each.id for each in auth.list_user_roles(user)}
    for other in role_ids.values():
        if other in held and other != role_ids[role]:
            auth.unassign_role(user, other)
    if role_ids[role] not in held:
        auth.assign_role(user, role_ids[role])


def revoke_own_grants(auth: AuthServiceClient, user: str, resources: Resources) -> None:
    """Takes back what a user was given beside a role, or got for having made the model or the experiment."""
    for row in auth._request(LIST_USER_PERMISSIONS, "GET", params={"username": user})["permissions"]:
        own = row["role_name"].startswith("__user_")  # MLflow keeps such grants in a role of this name
        if own and (row["resource_type"], row["resource_pattern"]) in resources:
            auth.revoke_user_permission(user, row["resource_type"], row["resource_pattern"])


def report(auth: AuthServiceClient, role_ids: Mapping[str, int], resources: Resources) -> int:
    """Prints what each user may do as MLflow resolves it; 1 if that is more than the role's, which it says why."""
    print(f"{'user':20} {'role':10} {'experiment':11} {'model':11} history")
    status = 0
    for user in sorted(each["username"] for each in all_users(auth) if not each["is_admin"]):
        held = {each.id for each in auth.list_user_roles(user)}
        role = next((role for role, number in role_ids.items() if number in held), "-")
        may = [auth.get_user_permission(user, *resource).permission for resource in resources]
        print(f"{user:20} {role:10} {may[0]:11} {may[1]:11} {may[2]}")
        # An experiment may be shared with another model's submitters.
        limits = ROLES.get(role, ROLES["submitter"])
        excess = [
            f"{permission} on {' '.join(resource)}"
            for resource, permission, limit in zip(resources, may, limits, strict=True)
            if PERMISSION_PRIORITY[permission] > PERMISSION_PRIORITY[limit]
        ]
        parts = {part: auth.get_user_permission(user, part, "*").permission for part in PARTS}
        excess += [
            f"{permission} on every {part}"
            for part, permission in parts.items()
            if PERMISSION_PRIORITY[permission] > PERMISSION_PRIORITY["READ"]
        ]
        if excess:
            status = 1
            print(
                f"set-up-roles: {user} has {', '.join(excess)}. Name {user} with a role here, take the grant away, "
                "and see that default_permission in basic_auth.ini is READ.",
                file=sys.stderr,
            )
    return status


if __name__ == "__main__":
    sys.exit(main())
