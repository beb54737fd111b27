"""The accelerate configurations are what accelerate reads, and start a training."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "accelerate").glob("*.yaml"))


def test_there_is_one_for_each_way_to_divide_a_model() -> None:
    assert [file.stem for file in CONFIGS] == ["ddp", "fsdp2", "zero2", "zero3"]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_accelerate_reads_it(file: Path) -> None:
    config = load_config_from_file(str(file))
    assert isinstance(config, ClusterConfig)
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(file.stem, "DEEPSPEED")
    assert config.distributed_type == kind
    assert not config.use_cpu
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(file.stem[-1])
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
