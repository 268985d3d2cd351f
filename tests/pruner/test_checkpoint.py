"""Official weights, our own format, and everything that can be wrong with a file."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import save_file

from ocvtp import CheckpointError, OCPruner, PrunerConfig
from ocvtp.pruner.checkpoint import to_official_keys
from tests.conftest import SMALL, Golden, make_pruner

WITH_DECODER = PrunerConfig(
    in_dim=48,
    hidden_dim=96,
    slot_dim=32,
    ffn_dim=64,
    num_iters=2,
    layer=5,
    decoder_layers=3,
    decoder_heads=2,
    decoder_ffn_dim=80,
    decoder_tokens=49,
)


def same(a: OCPruner, b: OCPruner) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", None])
@pytest.mark.parametrize("with_decoder", [False, True])
def test_official_round_trip(
    tmp_path: Path, golden: Golden, suffix: str | None, wrapped: bool, with_decoder: bool
) -> None:
    state = {k: v for k, v in golden.state.items() if with_decoder or not k.startswith("decode.")}
    source: object = {"state_dict": state} if wrapped else state
    if suffix == ".safetensors":
        if wrapped:
            pytest.skip("a safetensors file has no nesting")
        save_file(state, tmp_path / "weights.safetensors")
        source = tmp_path / "weights.safetensors"
    elif suffix == ".pth":
        torch.save(source, tmp_path / "weights.pth")
        source = str(tmp_path / "weights.pth")
    pruner = OCPruner.from_official(source)
    config = golden.config
    assert pruner.config.in_dim == config["enc_in_dim"]
    assert [pruner.config.hidden_dim, pruner.config.slot_dim] == config["enc_dims"]
    assert pruner.config.ffn_dim == config["agg_ffn_dim"]
    if with_decoder:
        assert pruner.config.decoder_layers == config["backbone_nlayer"]
        assert pruner.config.decoder_ffn_dim == config["transformer_feedforward"]
        assert [pruner.config.decoder_tokens] == config["pos_resolut"]
    back = pruner.to_official()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_official_sizes_and_key_counts() -> None:
    """The published layout at its published size, without allocating it."""
    with torch.device("meta"):
        pruner = OCPruner(PrunerConfig(decoder_layers=4))
    official = to_official_keys(pruner.state_dict())
    decoder = {key for key in official if key.startswith("decode.")}
    assert (len(official), len(decoder)) == (69, 44)
    assert sum(official[key].numel() for key in decoder) == 69_288_960
    assert sum(tensor.numel() for tensor in official.values()) == 76_905_472
    assert official["aggregat.gru.weight_ih"].shape == (1536, 512)
    assert official["decode.posit_embed._pe"].shape == (1, 576, 1024)
    assert "decode.backbone.layers.0.norm1.weight" not in official
    assert "decode.backbone.layers.1.norm1.weight" in official


def test_loading_copies(golden: Golden) -> None:
    state = {key: tensor.clone() for key, tensor in golden.state.items()}
    pruner = OCPruner.from_official(state)
    with torch.no_grad():
        for parameter in pruner.parameters():
            parameter.zero_()
    assert all(torch.equal(state[key], golden.state[key]) for key in state)
    assert not pruner.training
    assert all(parameter.requires_grad for parameter in pruner.parameters())


def broken(golden: Golden, name: str) -> tuple[object, str]:
    """A damaged official state dict and what the message must contain."""
    state = dict(golden.state)
    key = "aggregat.proj_k.weight"
    if name == "missing":
        del state[key]
        return state, key
    if name == "missing size":
        del state["encode_project.mlp.1.weight"]
        return state, "encode_project.mlp.1.weight"
    if name == "missing decoder part":
        del state["decode.norm0.weight"]
        return state, "decode.norm0.weight"
    if name == "unexpected":
        state["aggregat.proj_x.weight"] = state[key]
        return state, "aggregat.proj_x.weight"
    if name == "one of our names":
        state["encoder.norm.weight"] = state["encode_project.mlp.0.weight"]
        return state, "encoder.norm.weight"
    if name == "mixed dtypes":
        state[key] = state[key].half()
        return state, "one dtype"
    if name == "misshapen":
        state[key] = state[key][:-1]
        return state, key
    if name == "wrong rank":
        state["initializ.mean"] = state["initializ.mean"].flatten()
        return state, "initializ.mean"
    if name == "not finite":
        state[key] = torch.full_like(state[key], torch.nan)
        return state, f"{key}.*NaN"
    if name == "integer":
        state[key] = state[key].long()
        return state, f"{key}.*int64"
    if name == "not a tensor":
        return {**state, "epoch": 3}, "epoch.*int"
    if name == "no official file":
        return {"model.embed_tokens.weight": torch.zeros(2, 2)}, "encode_project"
    return [1, 2], "state dict"


@pytest.mark.parametrize(
    "name",
    [
        "missing",
        "missing size",
        "missing decoder part",
        "unexpected",
        "one of our names",
        "mixed dtypes",
        "misshapen",
        "wrong rank",
        "not finite",
        "integer",
        "not a tensor",
        "no official file",
        "a list",
    ],
)
def test_damaged_official_weights(tmp_path: Path, golden: Golden, name: str) -> None:
    state, message = broken(golden, name)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=message):
        OCPruner.from_official(tmp_path / "weights.pth")


def test_official_heads_must_divide_the_width(golden: Golden) -> None:
    with pytest.raises(CheckpointError, match="decoder_heads=5"):
        OCPruner.from_official(golden.state, decoder_heads=5)


class _Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("executed"),))  # type: ignore[return-value]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_loading_never_executes_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": _Payload()}, "weights.pth")
    Path("plain.pth").write_bytes(pickle.dumps(_Payload()))
    for name in ("weights.pth", "plain.pth"):
        with pytest.raises(CheckpointError, match=f"{name} .*tensors alone") as caught:
            OCPruner.from_official(name)
        assert "weights_only" not in str(caught.value)  # torch's advice would run what is in the file
        assert caught.value.__cause__ is not None
    with pytest.raises(CheckpointError, match="tensors alone"):
        OCPruner.from_pretrained(str(tmp_path))
    assert not Path("executed").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_are_no_checkpoints(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        OCPruner.from_official(path)
    for content in (b"", b"junk", b"not a checkpoint", bytes(range(256))):
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            OCPruner.from_official(path)
    with pytest.raises(CheckpointError, match="folder"):
        OCPruner.from_official(tmp_path)


@pytest.mark.parametrize("config", [SMALL, WITH_DECODER])
def test_our_format_round_trip(tmp_path: Path, config: PrunerConfig) -> None:
    pruner = make_pruner(config)
    pruner.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    loaded = OCPruner.from_pretrained(str(tmp_path))
    assert loaded.config == config
    assert same(loaded, pruner)
    assert not loaded.training
    x = torch.randn(2, 49, config.in_dim)
    assert torch.equal(loaded(x, keep=9).indices, pruner(x, keep=9).indices)
    assert OCPruner.from_pretrained(tmp_path).config == config  # a Path, too
    assert OCPruner.from_pretrained(tmp_path, map_location="meta").slot_mean.is_meta


def test_our_format_of_a_default_pruner_and_of_half_weights(tmp_path: Path) -> None:
    OCPruner().save_pretrained(tmp_path / "default")
    assert OCPruner.from_pretrained(tmp_path / "default").config == PrunerConfig()
    make_pruner().half().save_pretrained(tmp_path / "half")
    assert OCPruner.from_pretrained(tmp_path / "half").slot_mean.dtype == torch.float16


def test_a_folder_with_official_weights_only(tmp_path: Path, golden: Golden) -> None:
    torch.save(golden.state, tmp_path / "weights.pth")
    loaded = OCPruner.from_pretrained(str(tmp_path))
    assert same(loaded, OCPruner.from_official(golden.state))


def test_damaged_folders(tmp_path: Path) -> None:
    make_pruner().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    (tmp_path / "config.json").write_text(json.dumps({**config, "num_heads": 3}))
    with pytest.raises(CheckpointError, match="num_heads"):
        OCPruner.from_pretrained(str(tmp_path))
    for text in ("{", "[]", '{"eps": "small"}', '{"dropout": null}', '{"eps": Infinity}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json is no pruner's configuration"):
            OCPruner.from_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**config, "slot_dim": 64, "layer": 7}))
    with pytest.raises(CheckpointError, match=r"slot_dim is 64, was 32; layer is 7, was 1 when model"):
        OCPruner.from_pretrained(str(tmp_path))
    # Of an older version, or another program: what the weights don't say can't be compared.
    save_file(make_pruner().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has shape \[32\]; the other sizes ask for \[64\]"):
        OCPruner.from_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**config, "decoder_layers": 1}))
    with pytest.raises(CheckpointError, match=r"missing.*decoder"):
        OCPruner.from_pretrained(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        OCPruner.from_pretrained(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"weights\.pth"):
        OCPruner.from_pretrained(str(tmp_path))


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a folder nor a repository id"):
        OCPruner.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("source", ["", " "])
def test_an_empty_name_is_not_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    make_pruner().save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="empty string"):
        OCPruner.from_pretrained(source)
    with pytest.raises(FileNotFoundError, match=r"empty|no checkpoint"):
        OCPruner.from_official(source)
    OCPruner.from_pretrained(".")


@pytest.mark.parametrize("source", [None, [1, 2], 3])
def test_what_is_no_source(source: object) -> None:
    with pytest.raises(TypeError, match=f"path or a state dict; got {type(source).__name__}"):
        OCPruner.from_official(source)
    with pytest.raises(TypeError, match=f"folder or repository id; got {type(source).__name__}"):
        OCPruner.from_pretrained(source)


def test_the_other_format(tmp_path: Path, golden: Golden) -> None:
    """Each loader knows the other's files, and says who reads them."""
    make_pruner().save_pretrained(tmp_path)
    ours = tmp_path / "model.safetensors"
    for source in (ours, make_pruner().state_dict()):
        with pytest.raises(CheckpointError, match=r"ocvtp's own format.*from_pretrained"):
            OCPruner.from_official(source)
    torch.save(golden.state, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"weights\.pth is a file.*from_official"):
        OCPruner.from_pretrained(tmp_path / "weights.pth")


def test_layer_of_official_weights(tmp_path: Path, golden: Golden) -> None:
    torch.save(golden.state, tmp_path / "weights.pth")
    assert OCPruner.from_pretrained(tmp_path).config.layer == 8
    assert OCPruner.from_pretrained(tmp_path, layer=3).config.layer == 3


def test_layer_of_our_format(tmp_path: Path) -> None:
    make_pruner().save_pretrained(tmp_path)
    assert OCPruner.from_pretrained(tmp_path, layer=SMALL.layer).config == SMALL
    with pytest.raises(ValueError, match=r"reads encoder layer 1, as its config\.json says, not 3"):
        OCPruner.from_pretrained(tmp_path, layer=3)


@pytest.mark.parametrize("name", ["model.safetensors", "weights.pth"])
def test_a_defect_in_a_folder_names_the_file(tmp_path: Path, golden: Golden, name: str) -> None:
    if name == "weights.pth":
        state = {key: tensor for key, tensor in golden.state.items() if key != "initializ.mean"}
        torch.save(state, tmp_path / name)
    else:
        make_pruner().save_pretrained(tmp_path)
        state = {key: tensor for key, tensor in make_pruner().state_dict().items() if key != "slot_mean"}
        save_file(state, tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{tmp_path / name}: missing key"):
        OCPruner.from_pretrained(tmp_path)


def test_a_defect_in_an_official_file_names_it(tmp_path: Path, golden: Golden) -> None:
    state = dict(golden.state)
    del state["initializ.mean"]
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"weights\.pth: .*initializ\.mean"):
        OCPruner.from_official(tmp_path / "weights.pth")


def test_more_than_tensors_names_the_file(tmp_path: Path, golden: Golden) -> None:
    torch.save({**golden.state, "epoch": 3}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"weights\.pth: expected only tensors; 'epoch' is int"):
        OCPruner.from_official(tmp_path / "weights.pth")


def test_a_models_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds a 'llava' model, not a pruner"):
        OCPruner.from_pretrained(tmp_path)
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="it is a 'llava' model's"):
        OCPruner.from_pretrained(tmp_path)


class TestHubRepository:
    """A repository id, with the Hub's download replaced by local files."""

    @pytest.fixture
    def hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        def download(repo_id: str, filename: str, *, revision: str | None, **_: object) -> str:
            assert (repo_id, revision) == ("someone/pruner", "v1")
            if not (tmp_path / filename).exists():
                raise EntryNotFoundError(f"no {filename} at v1")
            return str(tmp_path / filename)

        monkeypatch.setattr("ocvtp.pruner.hub.hf_hub_download", download)
        return tmp_path

    def test_our_format(self, hub: Path) -> None:
        pruner = make_pruner()
        pruner.save_pretrained(hub)
        assert same(OCPruner.from_pretrained("someone/pruner", revision="v1"), pruner)

    def test_official_weights_only(self, hub: Path, golden: Golden) -> None:
        torch.save({"state_dict": golden.state}, hub / "weights.pth")
        assert same(
            OCPruner.from_pretrained("someone/pruner", revision="v1"), OCPruner.from_official(golden.state)
        )

    def test_neither(self, hub: Path) -> None:
        message = r"someone/pruner has neither .*: no model\.safetensors at v1"
        with pytest.raises(FileNotFoundError, match=message) as caught:
            OCPruner.from_pretrained("someone/pruner", revision="v1")
        assert isinstance(caught.value.__cause__, EntryNotFoundError)

    def test_a_models(self, hub: Path) -> None:
        (hub / "config.json").write_text('{"model_type": "llava"}')
        with pytest.raises(FileNotFoundError, match="someone/pruner holds a 'llava' model, not a pruner"):
            OCPruner.from_pretrained("someone/pruner", revision="v1")

    def test_offline_waits_for_the_network_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        local_only = []

        def download(*_: object, local_files_only: bool, **__: object) -> str:
            local_only.append(local_files_only)
            if local_files_only:
                raise LocalEntryNotFoundError("set 'local_files_only' to False")
            raise LocalEntryNotFoundError("not in the cache") from ConnectionError("no such host")

        monkeypatch.setattr("ocvtp.pruner.hub.hf_hub_download", download)
        with pytest.raises(FileNotFoundError) as caught:
            OCPruner.from_pretrained("nope")
        assert local_only == [False, True]
        assert str(caught.value) == (
            "no folder 'nope' here, and the Hub can't be reached; check the spelling, or the connection: "
            "no such host"
        )
        assert str(caught.value.__cause__) == "not in the cache"

    def test_a_connection_lost_half_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Only what the Hub answered may be called missing."""

        def download(repo_id: str, filename: str, **_: object) -> str:
            if filename == "model.safetensors":
                raise EntryNotFoundError("404")
            raise LocalEntryNotFoundError("timed out")

        monkeypatch.setattr("ocvtp.pruner.hub.hf_hub_download", download)
        with pytest.raises(FileNotFoundError, match=r"can't be reached.*timed out"):
            OCPruner.from_pretrained("someone/pruner")

    def test_offline_without_a_cache(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"'someone/pruner' here, and no download of it \(local"):
            OCPruner.from_pretrained("someone/pruner", local_files_only=True, cache_dir=tmp_path)
