"""Who we are, from a launcher's environment."""

import pytest

from taming_dist.errors import UserError
from taming_dist.launch import Place, place

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "MASTER_ADDR": "node2",
    "MASTER_PORT": "12345",
}
ALONE = Place(0, 1, 0, "127.0.0.1", 0)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ALONE),
        ({"PATH": "/bin", "MASTER_PORT": "1"}, ALONE),
        (TORCHRUN, Place(3, 4, 1, "node1", 29500)),
        (SLURM, Place(5, 8, 1, "node2", 12345)),
        (SLURM | TORCHRUN, Place(3, 4, 1, "node1", 29500)),
        # the batch script itself, or an interactive shell of an allocation: no task of srun
        ({name: SLURM[name] for name in SLURM if name != "SLURM_STEP_ID"}, ALONE),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, ALONE),
        (
            TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
            Place(0, 1, 0, "node1", 29500),
        ),
        (SLURM | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}, ALONE),
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0"},
            ALONE,
        ),
    ],
)
def test_the_place_follows_from_the_launchers_variables(
    environment: dict[str, str], expected: Place
) -> None:
    assert place(environment) == expected


@pytest.mark.parametrize("absent", list(TORCHRUN))
def test_a_part_of_torchruns_variables_is_an_error_that_names_what_is_missing(absent: str) -> None:
    with pytest.raises(UserError, match=absent):
        place({name: value for name, value in TORCHRUN.items() if name != absent})


@pytest.mark.parametrize("absent", ["SLURM_NTASKS", "SLURM_LOCALID", "MASTER_ADDR", "MASTER_PORT"])
def test_a_part_of_sruns_variables_is_an_error_that_names_what_is_missing(absent: str) -> None:
    with pytest.raises(UserError, match=absent):
        place({name: value for name, value in SLURM.items() if name != absent})


def test_a_variable_that_is_no_number_is_an_error() -> None:
    with pytest.raises(UserError, match="RANK='first' is not a number"):
        place(TORCHRUN | {"RANK": "first"})
