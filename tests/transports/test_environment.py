from fractions import Fraction

import numpy as np
import pytest

from transports.environment import check_timeout, detect, hosts, settings
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


def without(variables, *names):
    return {name: value for name, value in variables.items() if name not in names}


@pytest.mark.parametrize(
    ("variables", "source", "rank", "size", "local_rank", "one_host", "rendezvous"),
    [
        ({}, "alone", 0, 1, 0, True, None),
        (OPEN_MPI, "open mpi", 1, 4, 1, True, None),
        (MPICH, "mpich", 1, 2, 1, True, None),
        (TORCHRUN, "torchrun", 5, 8, 1, False, ("10.0.0.1", 31397)),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "8"}, "torchrun", 5, 8, 1, True, None),
        (without(TORCHRUN, "LOCAL_WORLD_SIZE"), "torchrun", 5, 8, 1, False, ("10.0.0.1", 31397)),
        (without(TORCHRUN, "LOCAL_WORLD_SIZE") | {"MASTER_ADDR": "localhost"}, "torchrun", 5, 8, 1, True, None),
        (without(TORCHRUN, "LOCAL_WORLD_SIZE", "LOCAL_RANK"), "torchrun", 5, 8, 5, False, ("10.0.0.1", 31397)),
        (without(OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE"), "open mpi", 1, 4, 1, False, None),
        (SRUN | {"PMI_RANK": "3", "PMI_SIZE": "4"}, "srun", 3, 4, 1, False, ("gpu03", 26775)),
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


def test_torchrun_jobs_are_told_apart():
    same = [detect(TORCHRUN | {"RANK": str(rank), "LOCAL_RANK": str(rank % 4)}) for rank in range(8)]
    assert len({(world.job, world.rendezvous) for world in same}) == 1
    # `none` is the run id of every torchrun --standalone.
    alone = TORCHRUN | {"LOCAL_WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "none"}
    assert detect(alone).job != detect(alone | {"MASTER_PORT": "29501"}).job
    ports = [detect(TORCHRUN | {"MASTER_PORT": str(port)}).rendezvous[1] for port in range(20000, 32000)]
    assert all(port != 20000 + k for k, port in enumerate(ports))
    assert {20000 <= port < 32000 for port in ports} == {True}


def test_ranks_on_several_hosts_need_no_name_when_they_have_an_address(monkeypatch):
    variables = without(MPICH, "MPI_LOCALNRANKS") | {"COLLECTIVES_RENDEZVOUS": "h:1"}
    here = detect(variables).job
    monkeypatch.setattr("os.getppid", lambda: 1)  # another host's launcher
    assert detect(variables).job == here


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("gpu[01-03,07],login2", "gpu01 gpu02 gpu03 gpu07 login2"),
        ("a,b", "a b"),
        ("n1-[2,4]", "n1-2 n1-4"),
        ("solo", "solo"),
        ("a[1-2]b[3-4]", "a1b3 a1b4 a2b3 a2b4"),
        ("n[001-003,7]", "n001 n002 n003 n7"),
        ("n[9-11]", "n9 n10 n11"),
        ("n[098-101]", "n098 n099 n100 n101"),
        ("rack[0-1]-n[2]-ib,x[5,7]", "rack0-n2-ib rack1-n2-ib x5 x7"),
        ("[1-2]", "1 2"),
        ("n[3].example.org,m.example.org", "n3.example.org m.example.org"),
    ],
)
def test_node_lists(text, names):
    assert hosts(text) == names.split()


@pytest.mark.parametrize(
    "text", ["", ",", "a,", "a[", "a[]", "a]1", "a[1-]", "a[2-1]", "a[x]", "a b", "a[[1]]", "a" * 5000 + "["]
)
def test_what_is_no_node_list(text):
    with pytest.raises(RendezvousError, match="SLURM_STEP_NODELIST"):
        hosts(text)


def test_tasks_of_a_slurm_node():
    uneven = SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3(x2),1", "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_NUM_TASKS": "7"}
    assert [detect(uneven | {"SLURM_NODEID": str(node)}).local_size for node in range(3)] == [3, 3, 1]
    assert detect(without(SRUN, "SLURM_STEP_TASKS_PER_NODE")).local_size == 0


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "x"}, "OMPI_COMM_WORLD_RANK is 'x'"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "²"}, "OMPI_COMM_WORLD_RANK is '²'"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "9" * 5000}, "OMPI_COMM_WORLD_SIZE is '999"),
        (OURS | {"COLLECTIVES_RENDEZVOUS": "h:٣"}, "COLLECTIVES_RENDEZVOUS is 'h:٣'"),
        ({"PMI_PORT": "vm:45335", "PMI_ID": "1", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1"}, "without -pmi-port"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "4"}, "OMPI_COMM_WORLD_RANK is 4"),
        (OURS | {"COLLECTIVES_RENDEZVOUS": "nowhere"}, "COLLECTIVES_RENDEZVOUS is 'nowhere'"),
        (OURS | {"COLLECTIVES_TOKEN": "zz"}, "COLLECTIVES_TOKEN is not"),
        (without(TORCHRUN, "MASTER_ADDR"), "not MASTER_ADDR"),
    ],
)
def test_what_makes_no_sense_is_named(variables, named):
    with pytest.raises(RendezvousError, match=named.replace("[", r"\[")):
        detect(variables)


def test_settings():
    assert settings({}).timeout == 300
    assert settings({"COLLECTIVES_SLICE_BYTES": "4096"}).slice_bytes == 4096
    assert settings({"COLLECTIVES_TIMEOUT": "inf"}).timeout == float("inf")
    assert settings({}).algorithms == settings({"COLLECTIVES_ALGORITHMS": " "}).algorithms == {}
    assert settings({"COLLECTIVES_ALGORITHMS": "scan = chain,all_reduce=ring"}).algorithms == {
        "scan": "chain",
        "all_reduce": "ring",
    }
    for wrong in ("ring", "all_reduce=", "=ring", "scan=chain,scan=direct"):
        with pytest.raises(RendezvousError, match="COLLECTIVES_ALGORITHMS is .* expected names once each, as in all_"):
            settings({"COLLECTIVES_ALGORITHMS": wrong})
    for wrong in ("soon", "", "0", "-1", "nan"):
        with pytest.raises(RendezvousError, match=f"COLLECTIVES_TIMEOUT is '{wrong}'; expected a number of seconds"):
            settings({"COLLECTIVES_TIMEOUT": wrong})


def test_timeouts():
    for right in (0.5, 3, Fraction(1, 2), np.float32(2), np.int64(3), float("inf")):
        assert check_timeout(right, "timeout") == right
    assert check_timeout(10**400, "timeout") == float("inf")
    for kind, wrong in ((ValueError, 0), (ValueError, -1), (ValueError, float("nan")), (ValueError, -(10**400)),
                        (TypeError, "3"), (TypeError, None), (TypeError, [1]), (TypeError, 1j)):  # fmt: skip
        with pytest.raises(kind, match="^timeout is "):
            check_timeout(wrong, "timeout")
