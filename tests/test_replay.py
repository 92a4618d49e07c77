"""Networks called again by their recorded launches: the same bits as a call of their own, and no recording where none holds."""

from __future__ import annotations

import copy
import threading
import weakref
from typing import Any

import numpy as np
import pytest

import tinydiff as td
from tinydiff.attention_maps import watching
from tinydiff.hooks import profile
from tinydiff.kernels import conv, record
from tinydiff.models import UNet2DConditionModel, UNet2DModel
from tinydiff.nn import Linear, Module, Parameter
from tinydiff.optim import EMA, SGD
from tinydiff.replay import LEAST, MOST, Replay

CONFIG: dict[str, Any] = {
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [16, 16, 24],
    "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "num_class_embeds": 3,
}
TOLD: dict[str, Any] = {
    "in_channels": 2,
    "out_channels": 2,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 2,
    "cross_attention_dim": 24,
}


def build(config: dict[str, Any] = CONFIG) -> Any:
    td.manual_seed(0)
    return (UNet2DModel if config is CONFIG else UNet2DConditionModel).from_config(config)


def arguments(seed: int, n: int = 2, size: int = 16, config: dict[str, Any] = CONFIG) -> tuple[Any, ...]:
    """Picture, time, and class or text."""
    rng = np.random.default_rng(seed)
    x = td.tensor(rng.standard_normal((n, size, size, config["in_channels"]), np.float32))
    told = rng.integers(0, 3, n) if config is CONFIG else rng.standard_normal((n, 5, 24), np.float32)
    return x, rng.uniform(0, 1000, n), told


def run(model: Any, given: tuple[Any, ...]) -> np.ndarray:
    with td.no_grad():
        return model(*given).numpy()


def recordings(model: Any) -> list[Any]:
    return [call.recording for call in model.replay.calls.values()]


def replayed(model: Any) -> bool:
    """Whether the model has one recording, which holds."""
    (recording,) = recordings(model)
    return recording.refused is None and len(recording.launches) > 0


@pytest.mark.parametrize("config", [CONFIG, TOLD], ids=["class", "text"])
def test_a_replayed_call_has_the_bits_of_a_first_call_and_is_near_a_recorded_one(config: Any) -> None:
    model = build(config)
    run(model, arguments(0, config=config))
    for seed in (1, 2):
        given = arguments(seed, config=config)
        found = run(model, given)
        assert replayed(model)
        np.testing.assert_array_equal(found, run(build(config), given))
        differentiable = model(*given)
        assert differentiable.requires_grad
        np.testing.assert_allclose(found, differentiable.numpy(), rtol=0, atol=2e-5 * np.abs(found).max())


def test_a_result_stays_what_it_was_when_the_next_comes() -> None:
    model = build()
    results = [run(model, arguments(seed)) for seed in range(3)]
    kept = [result.copy() for result in results]
    run(model, arguments(3))
    np.testing.assert_array_equal(results, kept)
    assert np.abs(results[1] - results[2]).max() > 0.01


def test_weights_are_transformed_once_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, given = build(), arguments(1)
    run(kept, arguments(0))
    found = run(kept, given)
    monkeypatch.setattr(record.Recording, "prepare", lambda self, count: None)
    anew = build()
    run(anew, arguments(0))
    np.testing.assert_array_equal(found, run(anew, given))
    assert recordings(kept)[0].prepared > 0 == recordings(anew)[0].prepared
    launches = [len(recordings(model)[0].launches) // 3 for model in (kept, anew)]
    assert launches[0] < launches[1]  # by the transforms of Winograd; direct convolutions pack on the way


def test_nothing_is_recorded_where_gradients_are_wanted() -> None:
    model = build()
    model(*arguments(0))
    assert not model.replay.calls


def change_by_assignment(model: Any) -> None:
    with td.no_grad():
        model.conv_in.weight.assign_(model.conv_in.weight.numpy() + 1)


def change_by_a_step(model: Any) -> None:
    model(*arguments(5)).sum().backward()
    SGD(model.parameters(), 0.1).step()


def change_by_loading(model: Any) -> None:
    model.load_state_dict({name: value.numpy() * 0.5 for name, value in model.state_dict().items()})


def change_by_averages(model: Any) -> None:
    average = EMA(model.parameters(), 0.9)
    change_by_a_step(model)
    average.swap()
    change_by_loading(model)
    average.swap()


def change_by_new_layer(model: Any) -> None:
    td.manual_seed(1)
    model.conv_norm_out.weight = Parameter(np.full(16, 2, np.float32))
    model.down_blocks[1].resnets[0].time_emb_proj = Linear(64, 16)


def change_by_other_memory(model: Any) -> None:
    model.conv_in.weight.data = -model.conv_in.weight.data


@pytest.mark.parametrize(
    "change",
    [
        change_by_assignment,
        change_by_a_step,
        change_by_loading,
        change_by_averages,
        change_by_new_layer,
        change_by_other_memory,
    ],
)
def test_a_changed_network_answers_as_changed(change: Any) -> None:
    model, given = build(), arguments(0)
    before = [run(model, given) for _ in range(2)][1]
    change(model)
    after = [run(model, given) for _ in range(2)]
    fresh = copy.deepcopy(model)
    assert not fresh.replay.calls
    for found in after:
        np.testing.assert_array_equal(found, run(fresh, given))
    assert np.abs(after[0] - before).max() > 1e-3


def test_sizes_threads_and_precision_have_recordings_of_their_own_and_few_are_kept() -> None:
    model, before = build(), td.get_num_threads()
    try:
        for size in (8, 16):
            run(model, arguments(0, size=size))
        assert len(recordings(model)) == 2
        td.set_num_threads(1)
        run(model, arguments(0))
        assert len(recordings(model)) == 2 + (before > 1)
        conv.precise = True
        run(model, arguments(0))
        assert len(recordings(model)) == 3 + (before > 1)
    finally:
        conv.precise = False
        td.set_num_threads(before)
    for n in range(1, 4 + MOST):
        run(model, arguments(0, n, 8))
    assert len(recordings(model)) == MOST


def test_each_thread_has_its_own_recording() -> None:
    model, expected = build(), run(build(), arguments(0))
    found: list[np.ndarray] = []
    workers = [threading.Thread(target=lambda: found.extend(run(model, arguments(0)) for _ in range(20))) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 60
    for result in found:
        np.testing.assert_array_equal(result, expected)


def test_what_is_observed_is_computed_op_by_op() -> None:
    model = build()
    run(model, arguments(0))
    with profile() as seen:
        run(model, arguments(1))
    assert sum(row.calls for row in seen.rows if row.op in ("conv2d", "upsample_conv2d")) == sum(
        isinstance(module, td.nn.Conv2d) for _, module in model.named_modules()
    )


def test_attention_is_watched_after_a_recording() -> None:
    model, given = build(TOLD), arguments(0, config=TOLD)
    expected = [run(model, given) for _ in range(2)][1]
    with watching(model, 2, (16, 16)) as maps:
        found = [run(model, given) for _ in range(2)]
    assert maps.count == 2 * 4  # two calls: a transformer down, one in the middle, two up
    np.testing.assert_allclose(found[1], expected, rtol=0, atol=1e-5)
    run(model, given)
    assert replayed(model)


def test_a_watched_batch_is_not_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = build(TOLD), arguments(0, 4 * LEAST, config=TOLD)
    monkeypatch.setattr(record, "LIMIT", 1 << 22)  # floats: there is room for 16 samples, not for 32
    for _ in range(3):
        run(model, given)
    assert {len(call.inputs[0]) for call in model.replay.calls.values() if not call.recording.refused} == {2 * LEAST}
    with watching(model, 4 * LEAST, (16, 16)) as maps:
        run(model, given)
    assert maps.count == 4 and {len(sums) for sums in maps.sums.values()} == {4 * LEAST}
    with profile() as seen:
        run(model, given)
    assert sum(row.calls for row in seen.rows if row.op in ("conv2d", "upsample_conv2d")) == sum(
        isinstance(module, td.nn.Conv2d) for _, module in model.named_modules()
    )


def test_a_body_that_needs_numpy_is_not_recorded_but_right() -> None:
    model = build()
    for seed in range(2):  # 8 → 16, cut to 15: a view that a convolution copies
        given = arguments(seed, size=15)
        np.testing.assert_allclose(run(model, given), model(*given).numpy(), rtol=0, atol=1e-5)
    assert "contiguous" in recordings(model)[0].refused


BODIES: dict[str, Any] = {
    "a definition": lambda x: td.ops.sin(x),
    "a reshape that copies": lambda x: x.transpose(1, 2).reshape(-1).silu(),
    "a mask": lambda x: td.ops.scaled_dot_product_attention(x, x, x, np.tril(np.ones((6, 6), bool))),
}


@pytest.mark.parametrize("body", BODIES)
def test_bodies_without_a_recording(body: str) -> None:
    replay, xs = Replay(), [td.tensor(np.random.default_rng(i).standard_normal((2, 6, 6, 8), np.float32)) for i in range(2)]
    for x in xs:
        with td.no_grad():
            expected = BODIES[body](x).numpy()
            np.testing.assert_allclose(replay(BODIES[body], Module(), x).numpy(), expected, rtol=1e-5, atol=1e-6)
    (call,) = replay.calls.values()
    assert call.recording.refused


def test_dropout_is_drawn_anew_and_not_replayed() -> None:
    replay, x = Replay(), td.tensor(np.ones((2, 200), np.float32))
    with td.no_grad():
        found = [replay(lambda x: td.ops.dropout(x, 0.5), Module(), x).numpy() for _ in range(3)]
    assert not np.array_equal(found[0], found[1]) and not np.array_equal(found[1], found[2])


def test_an_error_while_recording_leaves_nothing_behind() -> None:
    model = build()
    with td.no_grad(), pytest.raises(ValueError, match="channels"):
        model(td.tensor(np.zeros((1, 8, 8, 2), np.float32)), 0.0, np.zeros(1, int))
    assert record.current is None and not model.replay.calls
    run(model, arguments(0))
    assert replayed(model)


def test_memory_is_lent_again_and_too_much_of_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def many(x: td.Tensor) -> td.Tensor:
        for _ in range(50):
            x = td.ops.silu(x)
        return x

    x = td.tensor(np.linspace(-1, 1, 4096, dtype=np.float32).reshape(2, 2048))
    replay = Replay()
    with td.no_grad():
        expected = many(x).numpy()
        found = [replay(many, Module(), x).numpy() for _ in range(2)]
        np.testing.assert_array_equal(found, [expected, expected])
        (call,) = replay.calls.values()
        assert call.recording.size < 4 * 4200

        monkeypatch.setattr(record, "LIMIT", 5000)
        small = Replay()
        np.testing.assert_array_equal(small(many, Module(), x).numpy(), expected)
    (call,) = small.calls.values()
    assert "MB" in call.recording.refused and not call.recording.launches


def test_what_a_recording_kept_outlives_its_refusal_until_the_call_ends() -> None:
    """The kernel whose memory was one block too much had its weights transformed into what was kept."""
    recording = record.Recording([])
    prepared = weakref.ref(recording.prepare(100))
    recording.refuse("of a test")
    assert prepared() is not None
    recording.clear()
    assert prepared() is None


@pytest.mark.parametrize("count, parts", [(64, {32}), (40, {20}), (37, {12, 13})])
def test_a_batch_too_large_to_record_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch, count: int, parts: set[int]) -> None:
    rng, ran = np.random.default_rng(0), []

    def body(x: td.Tensor, more: td.Tensor | None, y: td.Tensor) -> td.Tensor:
        ran.append(len(x.data))
        for _ in range(3):
            x = td.ops.silu(x)
        return td.ops.conv2d(x, td.tensor(weights), y)

    weights = rng.standard_normal((1, 1, 8, 8), np.float32)
    monkeypatch.setattr(record, "LIMIT", 64 * 16 * 16 * 8 + 64)
    replay, module = Replay(), Module()
    for _ in range(4):
        x, y = rng.standard_normal((count, 16, 16, 8), np.float32), rng.standard_normal((count, 8), np.float32)
        with td.no_grad():
            found = replay(body, module, td.tensor(x), None, td.tensor(y)).numpy()
            expected = body(td.tensor(x), None, td.tensor(y)).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    good = {call.inputs[0].shape[0] for call in replay.calls.values() if not call.recording.refused}
    assert good == parts
    ran.clear()
    with td.no_grad():
        replay(body, module, td.tensor(x), None, td.tensor(y))
    assert not ran


def test_a_batch_whose_parts_would_be_too_small_is_taken_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "LIMIT", 5000)
    replay, module, ran = Replay(), Module(), []
    x = td.tensor(np.ones((2 * LEAST - 1, 2048), np.float32))
    with td.no_grad():
        for _ in range(3):
            replay(lambda x: ran.append(len(x.data)) or td.ops.silu(x), module, x)
    assert ran == [2 * LEAST - 1] * 3
