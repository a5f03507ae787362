"""Two machines that share a folder, played by two programs here, give the bytes of one with two processes."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKS = """
    import sys
    from pathlib import Path
    from conftest import begun
    from carvana.data import Competition, TestSet
    from carvana.device import shared_among
    from carvana.inference import Ensemble, EnsembleSpec, Options, predict_run_lengths
    from carvana.training import Recipe, Trainer
    from carvana.training.launch import train
    folder, data, config, checkpoint = sys.argv[1:]
    competition, processes = Competition(data), shared_among(1, config)
    images = competition.train_images
    options = Options(batch_size=2, workers=0, processes=processes, shard_size=4)
    ensemble = Ensemble(EnsembleSpec.equal([Path(checkpoint)], ["none", "hflip"]))
    table = predict_run_lengths(ensemble, TestSet(images, images.names), Path(folder) / "parts", options)
    assert table["img"].tolist() == images.names
    run = begun(data, Path(folder) / "run", batch_size=2)
    history = train(Trainer(run, competition, Recipe.from_parameters(run.parameters()), 0, processes))
    assert history["images_seen"].iloc[-1] == 4 * history["step"].iloc[-1] > 0
"""
MACHINES = """
    compute_environment: LOCAL_MACHINE
    distributed_type: MULTI_GPU
    machine_rank: {rank}
    main_process_ip: 127.0.0.1
    main_process_port: {port}
    num_machines: {machines}
    num_processes: 2
    rdzv_backend: static
    same_network: true
    use_cpu: false
"""


def worked(folder: Path, machines: int, data: Path, checkpoint: Path) -> dict[str, bytes]:
    """Shards and weights that a prediction and a training on so many machines end with, by name."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    folder.mkdir()
    programs = []
    for rank in range(machines):
        config = folder / f"machine{rank}.yaml"
        config.write_text(textwrap.dedent(MACHINES.format(rank=rank, port=port, machines=machines)))
        command = [sys.executable, "-c", textwrap.dedent(WORKS), *map(str, (folder, data, config, checkpoint))]
        paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        programs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
    for program in programs:
        errors = program.communicate(timeout=300)[1]
        assert program.returncode == 0, errors
    weights = load_file(folder / "run" / "fold0" / "last.safetensors")
    written = {path.name: path.read_bytes() for path in (folder / "parts").glob("*.csv")}
    return written | {name: tensor.numpy().tobytes() for name, tensor in weights.items()}


@pytest.mark.slow
def test_two_machines_write_the_bytes_of_one(members, shared_competition, tmp_path):
    torch.set_num_threads(1)
    one, two = (worked(tmp_path / str(n), n, shared_competition, members[0]) for n in (1, 2))
    assert sum(name.endswith(".csv") for name in one) == 4
    assert one == two
