"""Files: whole or not at all, the published layout, and nothing trusted that a stranger could have written."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinydiff import io
from tinydiff.run import Run

DTYPES = ["float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool"]
SOURCES = [str(Path(__file__).parent), str(Path(io.__file__).parents[1])]  # what a process that a test starts needs to import
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and limits")


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    """The format by hand: length of the header (u64, little-endian), JSON header, data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------------------- whole files


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    io.write_atomic(tmp_path / "a", b"old")
    io.write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


def test_an_error_while_writing_keeps_the_old_file(tmp_path: Path) -> None:
    io.write_atomic(tmp_path / "a", b"old")
    with pytest.raises(RuntimeError), io.replacing(tmp_path / "a") as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"cannot write .*nowhere.a: No such file"):
        io.write_atomic(tmp_path / "nowhere" / "a", b"")


@posix
def test_a_full_disk_keeps_the_old_files_and_says_so(tmp_path: Path) -> None:
    io.save_weights(tmp_path / "w.safetensors", {"a": np.arange(4.0)})
    io.write_atomic(tmp_path / "b", b"old")
    script = """if True:
        import resource, sys
        sys.path[:0] = sys.argv[1:]
        import numpy as np
        from tinydiff import io
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        for write in (lambda: io.save_weights("w.safetensors", {"a": np.zeros(1 << 16)}),
                      lambda: io.write_atomic("b", bytes(1 << 17))):
            try:
                write()
            except OSError as error:
                print(error)
    """
    environment = os.environ | {"PYTHONPATH": str(Path(io.__file__).parents[1])}
    said = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, text=True, capture_output=True, check=True
    )
    lines = said.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("cannot write") and "too large" in line and "nothing was changed" in line for line in lines)
    assert names(tmp_path) == ["b", "w.safetensors"]
    assert (tmp_path / "b").read_bytes() == b"old"
    assert io.load_weights(tmp_path / "w.safetensors")["a"].tolist() == [0, 1, 2, 3]


# -------------------------------------------------------------------------------------------------------------------- JSON


def test_json_round_trip_with_numpy_scalars(tmp_path: Path) -> None:
    io.write_json(tmp_path / "c.json", {"rate": np.float32(0.5), "sizes": np.array([1, 2]), "name": "é", "folder": tmp_path})
    assert io.read_json(tmp_path / "c.json") == {"rate": 0.5, "sizes": [1, 2], "name": "é", "folder": str(tmp_path)}


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[1]", b"\xff{}", b'{"a": NaN}', b'{"a": 1} x', b"[" * 100_000, b"null"], ids=lambda data: data[:8]
)
def test_bad_json_is_one_line_that_names_the_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "c.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"c\.json") as caught:
        io.read_json(tmp_path / "c.json")
    assert "\n" not in str(caught.value)


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    io.write_json(tmp_path / "c.json", {"a": 1})
    for bad in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises(ValueError, match=r"c\.json"):
            io.write_json(tmp_path / "c.json", bad)
    assert io.read_json(tmp_path / "c.json") == {"a": 1}


def test_jsonl_appends_and_forgets_a_line_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    io.append_jsonl(path, {"step": 1, "loss": np.float32(0.25)})
    io.append_jsonl(path, {"step": 2, "loss": float("nan")})
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert io.read_jsonl(path) == [{"step": 1, "loss": 0.25}, {"step": 2, "loss": None}]


# ----------------------------------------------------------------------------------------------------------------- weights


@given(
    st.dictionaries(
        st.text(max_size=10).filter(lambda name: name != "__metadata__"),
        hnp.arrays(st.sampled_from(DTYPES), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)),
        max_size=4,
    ),
    st.dictionaries(st.text(max_size=10), st.text(max_size=10), max_size=3),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_weights_round_trip(tmp_path: Path, weights: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    path = tmp_path / "w.safetensors"
    io.save_weights(path, weights, metadata)
    back = io.load_weights(path)
    assert back.keys() == weights.keys()
    for name, array in weights.items():
        assert back[name].dtype == array.dtype
        assert back[name].shape == array.shape
        assert back[name].tobytes() == array.tobytes()
    assert io.load_metadata(path) == metadata
    assert io.hash_weights(back) == io.hash_weights(weights)


def test_weights_are_read_as_the_format_says(tmp_path: Path) -> None:
    header = {"__metadata__": {"k": "v"}, "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
    (tmp_path / "w.safetensors").write_bytes(safetensors_bytes(header, struct.pack("<4f", 1, 2, 3, 4)))
    assert io.load_weights(tmp_path / "w.safetensors")["a"].tolist() == [[1, 2], [3, 4]]
    assert io.load_metadata(tmp_path / "w.safetensors") == {"k": "v"}


def test_strided_and_big_endian_arrays_are_written_by_value(tmp_path: Path) -> None:
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    io.save_weights(tmp_path / "w.safetensors", {"t": matrix.T, "b": matrix.astype(">f4"), "s": matrix[:, ::-2]})
    back = io.load_weights(tmp_path / "w.safetensors")
    assert back["t"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert back["b"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert back["s"].tolist() == [[2, 0], [5, 3]]


F32 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
HOSTILE = {
    "empty": b"",
    "short": b"abc",
    "header longer than the file": struct.pack("<Q", 10**6) + b"{}",
    "absurd header length": struct.pack("<Q", 2**63) + b"{}",
    "not JSON": safetensors_bytes(b"\0\0\0"),
    "a list": safetensors_bytes(b"[]"),
    "nested": safetensors_bytes(b"[" * 100_000),
    "offsets outside the file": safetensors_bytes({"a": F32}, bytes(8)),
    "bytes left over": safetensors_bytes({"a": F32}, bytes(32)),
    "overlap": safetensors_bytes({"a": F32, "b": F32}, bytes(16)),
    "shape too large": safetensors_bytes({"a": F32 | {"shape": [10**9]}}, bytes(16)),
    "shape that overflows": safetensors_bytes({"a": F32 | {"shape": [2**62, 8]}}, bytes(16)),
    "negative shape": safetensors_bytes({"a": F32 | {"shape": [-4]}}, bytes(16)),
    "too many axes": safetensors_bytes({"a": F32 | {"shape": [4] + [1] * 99}}, bytes(16)),
    "unknown dtype": safetensors_bytes({"a": F32 | {"dtype": "Q9"}}, bytes(16)),
    "dtype that NumPy has not": safetensors_bytes({"a": F32 | {"dtype": "BF16", "shape": [8]}}, bytes(16)),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_weights_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "w.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"w\.safetensors") as caught:
        io.load_weights(tmp_path / "w.safetensors")
    assert "\n" not in str(caught.value)


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_corrupt_weights_are_read_or_refused_never_worse(tmp_path: Path, data: st.DataObject) -> None:
    header = {"a": F32, "b": {"dtype": "I64", "shape": [1, 2], "data_offsets": [16, 32]}}
    content = bytearray(safetensors_bytes(header, bytes(32)))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    (tmp_path / "w.safetensors").write_bytes(
        content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    )
    try:
        io.load_weights(tmp_path / "w.safetensors")
    except ValueError as error:
        assert "w.safetensors" in str(error)


@pytest.mark.parametrize("name", ["model.pt", "model.BIN", "model.ckpt", "model.pkl", "model.pth"])
def test_pickles_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"anything")
    for attempt in (lambda path: io.load_weights(path), lambda path: io.save_weights(path, {})):
        with pytest.raises(ValueError, match="pickles"):
            attempt(tmp_path / name)


def test_values_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    for bad in ([1.0], np.array(["a"]), np.array([None]), np.zeros(2, np.complex64), 1.0):
        with pytest.raises(TypeError, match=r"w\.safetensors: 'a' is"):
            io.save_weights(tmp_path / "w.safetensors", {"a": bad})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="__metadata__"):
        io.save_weights(tmp_path / "w.safetensors", {"__metadata__": np.zeros(1)})
    with pytest.raises(FileNotFoundError, match="no such file"):
        io.load_weights(tmp_path / "w.safetensors")


def test_hash_depends_on_every_part_and_nothing_else() -> None:
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    base = io.hash_weights({"a": a, "b": a})
    assert len(base) == 12
    assert base == io.hash_weights({"b": a.copy(order="F"), "a": a.astype(">f4")})
    changed = a.copy()
    changed[1, 2] = np.nextafter(changed[1, 2], np.float32(9))
    others = [{"a": a}, {"a": a, "c": a}, {"a": a, "b": changed}, {"a": a, "b": a.reshape(3, 2)}, {"a": a, "b": a.view(np.int32)}]
    assert len({base, *(io.hash_weights(other) for other in others)}) == 6


def test_the_published_layout() -> None:
    conv = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    disk = io.to_disk("w", conv, "conv")
    assert disk.shape == (5, 4, 2, 3)  # O, I, KH, KW
    assert disk[4, 1, 0, 2] == conv[0, 2, 1, 4]
    linear = np.arange(6).reshape(2, 3)
    assert io.to_disk("w", linear, "linear").tolist() == [[0, 3], [1, 4], [2, 5]]
    assert io.to_disk("w", linear, "other") is linear
    for kind, array in (("conv", conv), ("linear", linear), ("other", linear)):
        back = io.from_disk("w", io.to_disk("w", array, kind), kind)
        assert np.array_equal(back, array)
        assert back.flags.c_contiguous
    with pytest.raises(ValueError, match=r"layer\.weight has shape \(2, 3\); a conv weight has 4 axes"):
        io.to_disk("layer.weight", linear, "conv")
    with pytest.raises(ValueError, match=r"unknown kind of parameter 'norm'"):
        io.from_disk("w", linear, "norm")


# -------------------------------------------------------------------------------------------------------------- run folders


def save_step(run: Run, step: int, size: int = 4) -> None:
    """A checkpoint whose every number is its step, so that a mixture of two shows."""
    arrays = {"moment": np.full(size, step, np.float32), "weights": np.full(size, step, np.float32)}
    run.save({"w": np.full(size, step, np.float32)}, {"width": 8}, arrays, {"step": step, "rng": {"state": 2**100 + step}})


def test_run_round_trip(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", {"seed": 3})
    assert run.load_state() is None
    assert run.stats == []
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        run.load_model()
    run.append_stats({"step": 1, "loss": 0.5})
    run.log("hello")
    save_step(run, 7)

    again = Run.open(tmp_path / "run")
    assert again.config == {"seed": 3}
    assert again.stats == [{"step": 1, "loss": 0.5}]
    assert (tmp_path / "run" / "log.txt").read_text().endswith(" hello\n")
    loaded = again.load_state()
    assert loaded is not None
    assert loaded[1] == {"step": 7, "rng": {"state": 2**100 + 7}}
    assert loaded[0]["moment"].tolist() == [7, 7, 7, 7]
    weights, config = again.load_model()
    assert weights["w"].tolist() == [7, 7, 7, 7]
    assert config == {"width": 8}
    assert names(tmp_path / "run") == ["config.json", "log.txt", "model", "samples", "state", "stats.jsonl"]


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    Run.create(tmp_path / "run", {})
    with pytest.raises(FileExistsError, match=r"already holds a run; continue it with --resume"):
        Run.create(tmp_path / "run", {})
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="not empty and not a run"):
        Run.create(tmp_path / "home", {})
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        Run.open(tmp_path / "home")
    with pytest.raises(OSError, match="cannot make the folder"):
        Run.create(tmp_path / "home" / "thesis.tex" / "run", {})


def test_rewind_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", {})
    for step in (1, 2, 3):
        run.append_stats({"step": step})
    (run.path / "state" / ".state.safetensors.0123.tmp").touch()
    run.rewind(2)
    assert run.stats == [{"step": 1}, {"step": 2}]
    assert names(run.path / "state") == []


def test_a_state_that_is_none_is_refused(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", {})
    for metadata in (None, {"state": "{"}, {"state": "[]"}, {"state": '{"step": "1"}'}):
        io.save_weights(run.path / "state" / "state.safetensors", {}, metadata)
        with pytest.raises(ValueError, match=r"state\.safetensors holds no training state"):
            run.load_state()
    with pytest.raises(ValueError, match="needs the step"):
        run.save({}, {}, {}, {})


def check_whole(run: Run) -> int:
    """The step of the run's checkpoint, of which every number must be."""
    loaded = run.load_state()
    assert loaded is not None
    arrays, state = loaded
    assert {float(value) for array in arrays.values() for value in np.unique(array)} == {state["step"]}
    weights, config = run.load_model()
    assert config == {"width": 8}
    assert len(np.unique(weights["w"])) == 1
    assert weights["w"][0] - state["step"] in (0, 1)  # a model may be newer, never older
    return int(state["step"])


@posix
def test_a_kill_at_every_file_operation_leaves_a_checkpoint_whole(tmp_path: Path) -> None:
    # A process saves step 1; its copies save step 2, each killed just before or just after another of its file operations.
    script = """if True:
        import os, shutil, signal, sys
        sys.path[:0] = sys.argv[2:]
        from test_io import Run, save_step
        os.chdir(sys.argv[1])
        os.fsync = lambda handle: None  # only a power cut needs it, and it is slow
        save_step(Run.create("first", {}), 1)
        operations = {"open", "write", "close", "replace", "rename", "unlink", "chmod", "serialize_file", "mkdir"}
        moment = 0
        status = -1
        while status != 0:
            shutil.copytree("first", f"killed-{moment}")
            child = os.fork()
            if child == 0:
                seen = 0
                def kill(frame, event, function):
                    global seen
                    if event in ("c_call", "c_return") and function.__name__ in operations:
                        if seen == moment:
                            os.kill(os.getpid(), signal.SIGKILL)
                        seen += 1
                run = Run.open(f"killed-{moment}")
                sys.setprofile(kill)
                save_step(run, 2)
                sys.setprofile(None)
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert status in (0, -signal.SIGKILL), status
            moment += 1
    """
    subprocess.run([sys.executable, "-c", script, tmp_path, *SOURCES], check=True)
    steps = [check_whole(Run.open(tmp_path / f"killed-{moment}")) for moment in range(len(names(tmp_path)) - 1)]
    assert len(steps) > 30  # else the operations were not seen
    assert steps == sorted(steps)
    assert set(steps) == {1, 2}


@posix
def test_a_kill_at_any_moment_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", {})
    script = """if True:
        import sys
        sys.path[:0] = sys.argv[2:]
        from test_io import Run, save_step
        run = Run.open(sys.argv[1])
        step = run.load_state()[1]["step"] if run.load_state() else 0
        while True:
            step += 1
            save_step(run, step, 200_000)
            print(step, flush=True)
    """
    generator = random.Random(0)
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", script, run.path, *SOURCES], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            said = [int(writer.stdout.readline())]
            time.sleep(generator.uniform(0.0, 0.2))
            writer.send_signal(signal.SIGKILL)
            said += [int(line) for line in writer.stdout.read().splitlines()]
        assert check_whole(run) >= said[-1]
    run.rewind(0)
    assert names(run.path / "state") == ["state.safetensors"]
    assert names(run.path / "model") == ["config.json", "model.safetensors"]
