# SPDX-License-Identifier: Apache-2.0
"""Measured orders of backends: filed by device and shape, preferred to heuristics, written by `tune`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import run_python

import vidkernels
from vidkernels import _library, _measured, dispatch, ops
from vidkernels._commands import tune as _tune
from vidkernels.errors import OptionError
from vidkernels.ops import _attention_engines as engines
from vidkernels.ops import _causal_conv3d_backends as convolutions

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of this machine's orders."""
    monkeypatch.setattr(_measured, "cache_folder", lambda: tmp_path)
    _measured.forget()
    yield tmp_path
    _measured.forget()


def conv_arguments() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, 8, 3, 6, 6), torch.randn(4, 8, 3, 3, 3)


def test_a_measured_order_decides_and_explain_shows_it(folder: Path) -> None:
    x, weight = conv_arguments()
    before = vidkernels.explain("causal_conv3d", x, weight).chosen
    order = ["torch", "cpp"] if before == "cpp" else ["reference", "torch"]
    key = convolutions.shape_key(8, 4, (3, 3, 3), (1, 1, 1), torch.float32)
    _measured.write(folder / "causal_conv3d.json", "causal_conv3d", _measured.device_name(CPU), {key: order})
    _measured.forget()
    assert vidkernels.explain("causal_conv3d", x, weight).chosen == order[0]
    assert vidkernels.explain("causal_conv3d", x, weight[:2]).chosen == before, "another shape"
    compiled = torch.compile(lambda x, w: ops.causal_conv3d(x, w), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight), ops.causal_conv3d(x, weight, backend=order[0]))


def test_files_keep_other_devices_and_keys(folder: Path) -> None:
    path = folder / "varlen_attention.json"
    _measured.write(path, "varlen_attention", "one", {"a": ["x", "y"], "b": ["x"]})
    _measured.write(path, "varlen_attention", "two", {"a": ["y"]})
    _measured.write(path, "varlen_attention", "one", {"b": ["y", "x"]})
    assert _measured.read(path) == {"one": {"a": ["x", "y"], "b": ["y", "x"]}, "two": {"a": ["y"]}}
    assert [p.name for p in folder.iterdir()] == [path.name], "nothing partial stays"


def test_lengths_have_few_keys() -> None:
    keys = [engines.size_key(128, n, torch.bfloat16) for n in (1, 512, 513, 4096, 4097, 10**6)]
    assert len(set(keys)) == 3 and keys[0] == keys[1] and keys[2] == keys[3] and keys[4] == keys[5]


def test_packaged_tables_name_backends() -> None:
    ops.causal_conv3d, ops.varlen_attention  # noqa: B018 - defines the dispatchers
    for path in _measured.PACKAGED.glob("*.json"):
        known = dispatch.dispatchers()[path.stem].backends
        for orders in _measured.read(path).values():
            assert {name for order in orders.values() for name in order} <= set(known)


def test_tune_measures_what_can_run_and_writes_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_tune, "CONVOLUTIONS", ((8, 4, (3, 3, 3), (2, 64, 64)), (4, 8, (3, 1, 1), (3, 64, 64))))
    out = folder / "out"
    assert _tune.main(["--device", "cpu", "--dtype", "float32", "--seconds", "0.01", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(" ms" in line for line in lines[:2])
    assert [path.name for path in out.iterdir()] == ["causal_conv3d.json"], "a CPU has no choice of attentions"
    orders = json.loads((out / "causal_conv3d.json").read_text())["devices"][_measured.device_name(CPU)]
    runnable = {"cpp", "torch"} if _library.cpu_missing is None else {"torch"}
    assert len(orders) == 2 and all(set(order) == runnable for order in orders.values())


def test_tune_leaves_a_wrong_backend_out(capsys: pytest.CaptureFixture[str]) -> None:
    """However fast: a NaN is as wrong as a sum with a part missing."""

    def function(x: torch.Tensor, backend: str) -> torch.Tensor:
        return {"torch": x, "rounded": x * (1 + 2**-8), "wrong": x * 1.1, "unwritten": x * torch.nan}[backend]

    names = ["wrong", "rounded", "torch", "unwritten"]
    assert _tune._agreeing(function, ((torch.randn(9),), {}), names) == ["rounded", "torch"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines] == ["wrong", "unwritten"]


def test_attention_shapes_are_filed_by_their_own_length() -> None:
    subjects = list(_tune._attentions(torch.device("cuda"), torch.bfloat16, 1))
    assert {s.key for s in subjects} == {engines.size_key(dim, n, torch.bfloat16) for dim, _, n, _ in _tune.ATTENTIONS}


def test_tune_refuses_an_unknown_op() -> None:
    with pytest.raises(SystemExit):
        _tune.main(["alpha_blend"])


def test_a_damaged_file_is_named_and_one_of_an_older_version_still_serves(folder: Path) -> None:
    x, weight = conv_arguments()
    path = folder / "causal_conv3d.json"
    for text in ("{", "[]", '{"devices": [1]}', "{}"):
        path.write_text(text)
        _measured.forget()
        with pytest.raises(OptionError, match="causal_conv3d.json: expected JSON as .*Remove it, or run"):
            ops.causal_conv3d(x, weight)
    key = convolutions.shape_key(8, 4, (3, 3, 3), (1, 1, 1), torch.float32)
    path.write_text(json.dumps({"devices": {_measured.device_name(CPU): {key: ["withdrawn", "torch"]}}}))
    _measured.forget()
    assert vidkernels.explain("causal_conv3d", x, weight).chosen == "torch"
    torch.testing.assert_close(ops.causal_conv3d(x, weight), ops.causal_conv3d(x, weight, backend="torch"))


def test_a_user_without_a_home_has_a_cache() -> None:
    code = (
        "import pathlib\n"
        "def expanduser(self): raise RuntimeError('Could not determine home directory.')\n"
        "pathlib.Path.expanduser = expanduser\n"
        "from vidkernels import _measured; print(_measured.cache_folder().name)"
    )
    assert run_python(code).strip() == "configs"
