import pytest

from transports.environment import detect, first_host, settings
from transports.errors import RendezvousError

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "prterun-vm-2254@1", "PMIX_RANK": "1",
}  # fmt: skip
MPICH = {
    "PMI_RANK": "1",
    "PMI_SIZE": "2",
    "MPI_LOCALNRANKS": "2",
    "MPI_LOCALRANKID": "1",
    "PMI_HOSTNAME": "vm",
    "PMI_FD": "9",
}
TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "abc",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "77",
    "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "gpu[03-04]",
}  # fmt: skip
OURS = {
    "COLLECTIVES_RANK": "0", "COLLECTIVES_SIZE": "2", "COLLECTIVES_LOCAL_RANK": "0", "COLLECTIVES_LOCAL_SIZE": "2",
    "COLLECTIVES_JOB": "ab", "COLLECTIVES_RENDEZVOUS": "[::1]:4000", "COLLECTIVES_RENDEZVOUS_FD": "5", "COLLECTIVES_TOKEN": "00ff",
}  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "source", "rank", "size", "local_rank", "one_host", "rendezvous"),
    [
        ({}, "alone", 0, 1, 0, True, None),
        (OPEN_MPI, "open mpi", 1, 4, 1, True, None),
        (MPICH, "mpich", 1, 2, 1, True, None),
        (TORCHRUN, "torchrun", 5, 8, 1, False, ("10.0.0.1", 29501)),
        (OURS, "collectives", 0, 2, 0, True, ("::1", 4000)),
        (OPEN_MPI | OURS, "collectives", 0, 2, 0, True, ("::1", 4000)),
        (TORCHRUN | {"COLLECTIVES_RENDEZVOUS": "h:1"}, "torchrun", 5, 8, 1, False, ("h", 1)),
    ],
)
def test_launchers_are_recognised(variables, source, rank, size, local_rank, one_host, rendezvous):
    world = detect(variables)
    assert (world.source, world.rank, world.size, world.local_rank) == (source, rank, size, local_rank)
    assert (world.one_host, world.rendezvous) == (one_host, rendezvous)


def test_srun_across_hosts_agrees_on_an_address():
    worlds = [detect(SRUN | {"SLURM_PROCID": str(rank)}) for rank in range(4)]
    assert len({world.rendezvous for world in worlds}) == 1
    assert worlds[0].rendezvous[0] == "gpu03"
    assert not worlds[0].one_host
    assert detect(SRUN | {"SLURM_STEP_ID": "1"}).rendezvous != worlds[0].rendezvous


@pytest.mark.parametrize(
    ("nodes", "host"), [("gpu[01-03,07],login2", "gpu01"), ("a,b", "a"), ("n1-[2,4]", "n1-2"), ("solo", "solo")]
)
def test_first_host(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "x"}, "OMPI_COMM_WORLD_RANK is 'x'"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "4"}, "OMPI_COMM_WORLD_RANK is 4"),
        (OURS | {"COLLECTIVES_RENDEZVOUS": "nowhere"}, "COLLECTIVES_RENDEZVOUS is 'nowhere'"),
        (OURS | {"COLLECTIVES_TOKEN": "zz"}, "COLLECTIVES_TOKEN is not"),
        ({k: v for k, v in TORCHRUN.items() if k != "MASTER_ADDR"}, "not MASTER_ADDR"),
    ],
)
def test_what_makes_no_sense_is_named(variables, named):
    with pytest.raises(RendezvousError, match=named.replace("[", r"\[")):
        detect(variables)


def test_settings():
    assert settings({}).timeout == 300
    assert settings({"COLLECTIVES_SLICE_BYTES": "4096"}).slice_bytes == 4096
    with pytest.raises(RendezvousError, match="COLLECTIVES_TIMEOUT is 'soon'"):
        settings({"COLLECTIVES_TIMEOUT": "soon"})
