"""Training on the simulated GPU: the CPU's losses, no hidden copies, checkpoints that move, commands that take --device."""

import json

import numpy as np
import pytest

import tinydiff as td
from tinydiff import backend, nn, ops, optim, simarray
from tinydiff.cli import main
from tinydiff.evaluate import Judge
from tinydiff.pipeline import Pipeline, load_model
from tinydiff.run import Run
from tinydiff.tasks import configure, make_task
from tinydiff.train import Trainer, train

TINY = {"batch_size": 4, "model.block_out_channels": [8, 8, 16], "model.attention_head_dim": 8, "model.norm_num_groups": 4}


def task(kind="denoiser", **options):
    return make_task(configure(kind, "small", {"steps": 10, "showings": 1} | options))


@pytest.mark.parametrize("other", ["cudasim", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_unet_trains_ten_steps_to_the_cpus_losses(other):
    try:
        backend.check_device(other)
    except RuntimeError as error:
        pytest.skip(str(error))
    rows = {}
    for device in ("cpu", other):
        trainer = Trainer(task(**TINY, min_snr=5.0), 10, device)
        rows[device] = [trainer.advance() for _ in range(10)]
        assert trainer.model.device == device
        assert {p.device for p in trainer.model.parameters()} == {device}
    for name in ("loss", "grad_norm"):
        expected = [row[name] for row in rows["cpu"]]
        assert [row[name] for row in rows[other]] == pytest.approx(expected, rel=2e-3)
    assert rows["cpu"][-1]["loss"] != rows["cpu"][0]["loss"]


@pytest.mark.parametrize(
    "kind, options, up",
    [
        ("denoiser", TINY, ["example.x", "timestep embedding", "labels", "target"]),
        ("classifier", {"batch_size": 4, "model.widths": [8, 8]}, ["pictures", "target"]),
        ("autoencoder", {"batch_size": 2, "width": 8, "factor": 2}, ["pictures", "noise of the bottleneck"]),
        (
            "clip",
            {"batch_size": 4},
            ["pictures", "tokens", "where texts end", "what is before", "pairs left out", "own captions", "own pictures"],
        ),
    ],
)
def test_a_step_copies_the_batch_there_and_two_numbers_back(kind, options, up):
    trainer = Trainer(task(kind, **options), 10, "cudasim")
    trainer.advance()
    with simarray.recorded_copies() as copies:
        trainer.advance()
    there = [c for c in copies if c.direction == "to device"]
    back = [c for c in copies if c.direction == "to host"]
    assert len(there) == len(up), there
    assert [c.bytes for c in back] == [4, 8], back  # the loss, and the norm of the gradient


def test_dropout_copies_nothing_more(monkeypatch):
    trainer = Trainer(task("classifier", batch_size=4, **{"model.widths": [8, 8]}), 10, "cudasim")
    kind, forward = type(trainer.model), type(trainer.model).forward
    monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, ops.dropout(ops.dropout(x, 0.1) * 1.0, 0.2)))
    with simarray.recorded_copies() as copies:
        trainer.advance()
    assert [c.direction for c in copies] == ["to device"] * 2 + ["to host"] * 2, copies


def test_checkpoints_move_between_devices(tmp_path):
    config = configure("denoiser", "small", {"steps": 4, "showings": 1} | TINY)
    runs = {name: Run.create(tmp_path / name, config) for name in ("here", "there")}
    train(runs["here"])
    trainer = Trainer(make_task(config), 4, "cudasim")
    trainer.advance()
    trainer.advance()
    trainer.save(runs["there"])
    resumed = train(runs["there"])  # begun on the one, finished on the other
    assert resumed.model.device == "cpu" and resumed.step == 4
    here, there = load_model(tmp_path / "here")[0], load_model(tmp_path / "there", device="cudasim")[0]
    for a, b in zip(here.parameters(), there.parameters()):
        assert b.device == "cudasim"
        np.testing.assert_allclose(b.numpy(), a.numpy(), rtol=1e-3, atol=2e-5)


OPTIMISERS = [lambda p: optim.SGD(p, 0.1, 0.9, 0.01), lambda p: optim.AdamW(p, 0.1), lambda p: optim.Adam(p)]


@pytest.mark.parametrize("device", ["cpu", "cudasim"])
@pytest.mark.parametrize("make", OPTIMISERS)
def test_a_step_with_a_scale_is_one_of_clipped_gradients(make, device):
    outcomes = []
    for scaled in (False, True):
        td.manual_seed(0)
        model = nn.Linear(40, 30).to(device)
        parameters = model.parameters()
        optimizer, ema = make(parameters), optim.EMA(parameters, 0.5)
        x = td.tensor(np.random.default_rng(0).standard_normal((4, 40)), dtype=np.float32, device=device)
        for _ in range(2):
            (model(x) ** 2).sum().backward()
            if scaled:
                norm = optim.grad_norm(parameters)
                optimizer.step(0.1, ema, optim.clip_scale(norm, 0.5))
            else:
                norm = optim.clip_grad_norm(parameters, 0.5)
                assert optim.grad_norm(parameters) == pytest.approx(0.5)
                optimizer.step(0.1, ema)
            optimizer.zero_grad()
        outcomes.append([norm, *[p.numpy() for p in parameters], *optimizer.state_dict().values(), *ema.state_dict().values()])
    for a, b in zip(*outcomes):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert outcomes[0][0] > 0.5
    assert optim.clip_scale(0.3, 0.5) == 1
    with pytest.raises(ValueError, match="max_norm must be positive"):
        optim.clip_scale(1.0, 0.0)


@pytest.mark.parametrize("make", OPTIMISERS)
def test_optimisers_and_averages(make):
    outcomes = []
    for device in ("cpu", "cudasim"):
        td.manual_seed(0)
        model = nn.Linear(3, 2).to(device)
        x = td.tensor(np.arange(12, dtype=np.float32).reshape(4, 3) / 10, device=device)
        optimizer, ema = make(model.parameters()), optim.EMA(model.parameters(), 0.5)
        for _ in range(3):
            model(x).exp().sum().backward()
            norm = optim.clip_grad_norm(model.parameters(), 0.5)
            optimizer.step(ema=ema)
            optimizer.zero_grad()
        state = {name: array.copy() for name, array in (optimizer.state_dict() | ema.state_dict()).items()}
        assert all(type(array) is np.ndarray for array in state.values())
        ema.swap()
        outcomes.append([norm, *[p.numpy() for p in model.parameters()], *state.values()])
        again, averages = make(model.parameters()), optim.EMA(model.parameters())
        again.load_state_dict(optimizer.state_dict())
        averages.load_state_dict(ema.state_dict())
        assert again.steps == 3 and averages.updates == 3
    for a, b in zip(*outcomes):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-7)


def test_modules_move_with_their_gradients():
    model = nn.Linear(2, 1)
    parameters = model.parameters()
    model(td.tensor([[1.0, 2.0]])).sum().backward()
    assert model.to("cudasim") is model and model.device == "cudasim" and model.parameters() == parameters
    assert model.weight.grad.device == "cudasim" and model.weight.grad.tolist() == [[1], [2]]
    assert model.to("cpu").device == model.weight.grad.device == "cpu"
    model.to("cudasim").load_state_dict({"weight": np.ones((2, 1)), "bias": np.zeros(1)})
    assert model.device == "cudasim" and model.weight.tolist() == [[1], [1]]


def test_drawing_and_judging():
    drawn = {}
    for device in ("cpu", "cudasim"):
        pipeline, judge = Pipeline.load("digits", device), Judge.load("classifier", device)
        drawn[device] = pipeline.draw([3, 7], [0, 1], sampler="dpmpp_2m", steps=4)
        drawn[device, "looks"] = judge.look(drawn["cpu"])[0]
        assert pipeline.hash == Pipeline.load("digits").hash
    assert np.abs(drawn["cpu"].astype(int) - drawn["cudasim"]).max() <= 2
    np.testing.assert_allclose(drawn["cudasim", "looks"], drawn["cpu", "looks"], rtol=1e-3, atol=1e-4)


def test_commands_take_a_device(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = [f"--set={name}={json.dumps(value)}" for name, value in (TINY | {"showings": 0}).items()]
    for command in (
        ["train", "denoiser", "--out", "run", "--steps", "2", "--device", "cudasim", *settings],
        ["sample", "run", "--class", "3", "--n", "2", "--steps", "2", "--device", "cudasim"],
        ["dream", "--steps", "2", "--device", "cudasim"],
        ["eval", "run", "--n", "20", "--steps", "1", "--device", "cudasim"],
    ):
        with simarray.recorded_copies() as copies:
            assert main(command) == 0, capsys.readouterr().err
        assert copies
    assert main(["eval", "run", "--device", "tpu"]) == 2
    assert "unknown device 'tpu'; use one of cpu, cuda, cudasim" in capsys.readouterr().err
