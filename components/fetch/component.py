"""Fetch a raw data set into one archive."""

from kfp import dsl

from adfm.kubeflow.resources import image


@dsl.component(base_image=image("fetch"), install_kfp_package=False)
def fetch(source: str, name: str, revision: str, raw: dsl.Output[dsl.Dataset]):
    """The archive is `<name>.tar` in the artifact's folder: KFP moves an artifact file by file, one after another.

    The revision names the content of the source: it is no more than a part of the key of the cache.
    """
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from adfm.kubeflow import tasks

    with tasks.stage():
        from adfm.data import packed
        from adfm.data.sources import fetch
        from adfm.process import retries

        archive = Path(raw.path) / f"{name}.tar"
        archive.parent.mkdir(parents=True, exist_ok=True)
        # Not in /tmp, which is in memory on many machines and in the containers of a local run.
        with TemporaryDirectory(dir=archive.parent.parent) as place:
            folder = Path(place) / name
            retries.again(lambda: fetch(source, folder), f"fetching {source}")
            packed.pack(folder, archive)
        raw.metadata.update(source=source, name=name, revision=revision)
        tasks.name_artifacts({"Raw data": raw})
