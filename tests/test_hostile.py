"""Files that somebody else may have written: checkpoints that are wrong on purpose are refused, not obeyed."""

from __future__ import annotations

import hashlib
import json
import random
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import train_orchestrated
from training.errors import Refused

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory, data):
    """A run folder with one checkpoint."""
    from conftest import arguments

    out = tmp_path_factory.mktemp("hostile") / "run"
    path = out.parent / "s.json"
    path.write_text(json.dumps([{"name": "set_attn_lora_rank", "value": 2, "at_iter": 2}]))
    assert train_orchestrated.main(arguments(data, out, schedule=path, max_iters=4, keep_last=1)) == 0
    return out


def sealed(folder) -> None:
    """Make the manifest fit the files again, as somebody who means it would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def resumes_or_refuses(out) -> bool:
    """Whether the folder was accepted. Anything but a refusal escapes and fails the test."""
    try:
        return train_orchestrated.main(["--init_from=resume", f"--out_dir={out}", "--plan"]) == 0
    except Refused:
        return False


def places(value, path=()):
    """Paths to every value inside a JSON document."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for i in range(min(len(value), 3)):
            yield from places(value[i], (*path, i))


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(choice=st.integers(0, 10**6), value=JSON, drop=st.booleans())
def test_a_forged_state_is_refused_or_means_what_it_says(checkpoint_folder, tmp_path_factory, choice, value, drop):
    out = tmp_path_factory.mktemp("forged") / "run"
    shutil.copytree(checkpoint_folder, out, symlinks=True)
    folder = next(path for path in (out / "checkpoints").iterdir() if path.name.startswith("iter_"))
    state = json.loads((folder / "state.json").read_text())
    paths = [path for path in places(state) if path]
    path = paths[choice % len(paths)]
    inner = state
    for part in path[:-1]:
        inner = inner[part]
    if drop and isinstance(inner, dict):
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    (folder / "state.json").write_text(json.dumps(state))
    sealed(folder)
    resumes_or_refuses(out)
    shutil.rmtree(out.parent)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("seal", [False, True])
def test_noise_in_any_file_is_refused(checkpoint_folder, tmp_path, name, seal):
    draw = random.Random(1)
    for case in range(12):
        out = tmp_path / f"run{case}"
        shutil.copytree(checkpoint_folder, out, symlinks=True)
        folder = next(path for path in (out / "checkpoints").iterdir() if path.name.startswith("iter_"))
        content = bytearray((folder / name).read_bytes())
        match case % 4:
            case 0:
                content = content[: draw.randrange(len(content))]
            case 1:
                content = bytearray()
            case 2:
                content[draw.randrange(min(200, len(content)))] ^= 255
            case 3:
                content = bytearray(draw.randbytes(300))
        (folder / name).write_bytes(bytes(content))
        if seal and name != "manifest.json":
            sealed(folder)
        accepted = resumes_or_refuses(out)
        if not seal and name != "manifest.json":
            assert not accepted


def test_moments_of_another_model_are_refused(checkpoint_folder, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(checkpoint_folder, out, symlinks=True)
    folder = next(path for path in (out / "checkpoints").iterdir() if path.name.startswith("iter_"))
    moments = load_file(folder / "optimizer.safetensors")
    moments["transformer.ln_f.weight|exp_avg"] = torch.zeros(3)
    save_file(moments, folder / "optimizer.safetensors")
    sealed(folder)
    with pytest.raises(Refused, match="transformer.ln_f.weight does not fit"):
        train_orchestrated.main(["--init_from=resume", f"--out_dir={out}", "--max_iters=6"])
