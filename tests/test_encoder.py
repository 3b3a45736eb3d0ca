"""The encoders: what they compute, that padding is nothing to them, and that a saved one is the same and harmless."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tileloss.errors import InputError

transformers = pytest.importorskip("transformers")
Tokenizer = pytest.importorskip("tokenizers").Tokenizer

from tileloss.encoder import Encoder, StaticEncoder, TransformerEncoder, embed_texts, pool  # noqa: E402
from tileloss.tokenizer import learn_tokenizer  # noqa: E402

TEXTS = [
    "open the file and read all lines",
    "def open_file(path): return open(path)",
    "sort numbers",
    "HTTPServer getName",
    "sort the numbers of a list in place, and return nothing",
]


@pytest.fixture(scope="module")
def tokenizer():
    return learn_tokenizer(TEXTS * 3, 200)


@pytest.fixture
def static(tokenizer):
    torch.manual_seed(0)
    return StaticEncoder(tokenizer, dimension=16, max_length=8)


def _bert(tokenizer, pooling="mean"):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=24, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return TransformerEncoder(transformers.BertModel(config), tokenizer, pooling)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_pooling_sees_only_the_tokens_of_a_row(pooling, side):
    tokens, lengths = torch.randn(4, 5, 3), [5, 1, 3, 2]
    mask = torch.zeros(4, 5, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, slice(5 - length, 5) if side == "left" else slice(0, length)] = 1
    pick = {"mean": lambda x: x.mean(0), "cls": lambda x: x[0], "last": lambda x: x[-1]}[pooling]
    expected = torch.stack([pick(tokens[row][mask[row].bool()]) for row in range(4)])
    torch.testing.assert_close(pool(tokens, mask, pooling), expected)


def test_pooling_an_empty_row_gives_zero_and_an_unknown_pooling_an_error():
    assert pool(torch.ones(1, 3, 2), torch.zeros(1, 3)).tolist() == [[0.0, 0.0]]
    with pytest.raises(InputError, match="'mean', 'cls', 'last'"):
        pool(torch.ones(1, 3, 2), torch.ones(1, 3), "max")


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_a_text_is_embedded_the_same_alone_and_in_a_batch(tokenizer, pooling):
    encoder = _bert(tokenizer, pooling)
    together = encoder.encode(TEXTS)
    alone = torch.cat([encoder.encode([text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert len({tuple(row.tolist()) for row in together}) == len(TEXTS)


def test_static_embedding_is_the_mean_of_its_token_vectors(static):
    vectors = static.embeddings.weight.detach()
    for text, embedding in zip(TEXTS, static.encode(TEXTS), strict=True):
        ids = static.tokenizer(text, add_special_tokens=False)["input_ids"][:8]
        torch.testing.assert_close(embedding, vectors[ids].mean(0))
    assert static.encode(["", "sort"])[0].abs().sum() == 0


def test_static_encoder_goes_by_the_mask_whatever_pads(static):
    features = static.preprocess(TEXTS)
    expected = static(dict(features))["sentence_embedding"]
    rubbish = torch.where(features["attention_mask"] == 0, 7, features["input_ids"])
    padded = {"input_ids": rubbish, "attention_mask": features["attention_mask"]}
    torch.testing.assert_close(static(padded)["sentence_embedding"], expected)
    flipped = {name: value.flip(1) for name, value in padded.items()}
    torch.testing.assert_close(static(flipped)["sentence_embedding"], expected)


def test_remembered_texts_are_tokenised_as_new_ones_are(static, monkeypatch):
    first = static.preprocess(TEXTS)
    again = static.preprocess(TEXTS)
    monkeypatch.setattr("tileloss.encoder.REMEMBERED_TEXTS", 2)
    static._remembered.clear()
    unremembered = static.preprocess(TEXTS + TEXTS[:1])
    assert not static._remembered
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(first[name], again[name])
        assert torch.equal(first[name], unremembered[name][:-1])
    assert first["input_ids"].shape[1] == 8, "texts are cut at max_length"
    assert first["input_ids"].dtype == torch.int64


@pytest.mark.parametrize("make", [lambda t: StaticEncoder(t, 16, 8), lambda t: _bert(t, "last")])
def test_a_saved_encoder_loads_again_and_holds_nothing_executable(tokenizer, tmp_path, make):
    encoder = make(tokenizer)
    encoder.save_pretrained(tmp_path)
    loaded = Encoder.from_pretrained(tmp_path)
    assert type(loaded) is type(encoder)
    assert (loaded.max_length, loaded.get_embedding_dimension()) == (encoder.max_length, 16)
    assert getattr(loaded, "pooling", None) == getattr(encoder, "pooling", None)
    assert torch.equal(loaded.encode(TEXTS), encoder.encode(TEXTS))
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors", ".txt"}


def test_a_saved_transformer_is_one_for_the_transformers_library_too(tokenizer, tmp_path):
    encoder = _bert(tokenizer)
    encoder.save_pretrained(tmp_path)
    plain = transformers.AutoModel.from_pretrained(tmp_path)
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, encoder.transformer.state_dict()[name])


def test_any_transformers_folder_loads_with_a_choice_of_pooling(tokenizer, tmp_path):
    bert = _bert(tokenizer).transformer.bfloat16()
    bert.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = Encoder.from_pretrained(tmp_path, pooling="cls", max_length=4)
    assert isinstance(encoder, TransformerEncoder)
    assert (encoder.pooling, encoder.max_length) == ("cls", 4)
    assert encoder.preprocess(TEXTS)["input_ids"].shape == (5, 4)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}, "half-precision weights are trained in float32"
    assert Encoder.from_pretrained(tmp_path).max_length == 24, "by default what the model can take"


def test_code_in_a_model_folder_is_not_run(tokenizer, tmp_path):
    folder, trace = tmp_path / "model", tmp_path / "trace"
    _bert(tokenizer).save_pretrained(folder)
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}, "model_type": "evil"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="cannot load"):
        Encoder.from_pretrained(folder)
    assert not trace.exists()


class Trap:
    """What leaves a trace when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("make", [lambda t: StaticEncoder(t, 16, 8), _bert])
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("save", [torch.save, lambda trap, path: path.write_bytes(pickle.dumps(trap))])
def test_a_pickle_in_the_place_of_weights_is_not_run(tokenizer, tmp_path, make, weights, save):
    folder, trace = tmp_path / "model", tmp_path / "trace"
    make(tokenizer).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    save(Trap(trace), folder / weights)
    with pytest.raises(
        InputError, match=r"Ask whoever made them for model\.safetensors|no weights, model\.safetensors"
    ):
        Encoder.from_pretrained(folder)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Trap(trace)))
    assert trace.exists(), "a trap that does not spring shows nothing"


def test_a_tokenizer_without_padding_pads_with_its_end_of_text(tokenizer):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[UNK]", padding_side="left")
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=32)
    encoder = TransformerEncoder(transformers.GPT2Model(config), bare, "last")
    assert encoder.tokenizer.pad_token == "[UNK]"
    features = encoder.preprocess(TEXTS)
    assert features["attention_mask"][2, 0] == 0, "padding is on the left"
    output = encoder(features)
    torch.testing.assert_close(output["sentence_embedding"], output["token_embeddings"][:, -1])
    hopeless = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(InputError, match="pad_token"):
        TransformerEncoder(transformers.GPT2Model(config), hopeless)


def test_encoding_keeps_order_and_mode(static):
    static.train()
    embeddings = static.encode(TEXTS, batch_size=2)
    assert static.training
    assert (embeddings.dtype, embeddings.device.type, embeddings.requires_grad) == (torch.float32, "cpu", False)
    assert torch.equal(embeddings, torch.cat([static.encode([text]) for text in TEXTS]))

    seen = []

    class Spy(torch.nn.Module):
        def forward(self, features):
            seen.append((self.training, len(features["n"])))
            return {"sentence_embedding": features["n"][:, None].double()}

    lengths = embed_texts(Spy(), lambda texts: {"n": torch.tensor([len(t) for t in texts])}, TEXTS, batch_size=3)
    assert lengths.flatten().tolist() == [len(text) for text in TEXTS]
    assert seen == [(False, 3), (False, 2)]


@pytest.mark.parametrize("texts", ["a string", [], ["text", 3], None, {"a": 1}])
def test_wrong_texts_are_refused(static, texts):
    with pytest.raises(InputError, match="text"):
        static.encode(texts)


def test_wrong_models_are_refused(tokenizer, tmp_path):
    t5 = transformers.T5Model(
        transformers.T5Config(d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, vocab_size=10)
    )
    with pytest.raises(InputError, match="encoder-decoder"):
        TransformerEncoder(t5, tokenizer)
    with pytest.raises(InputError, match="pooling"):
        _bert(tokenizer, "max")
    with pytest.raises(InputError, match="dimension"):
        StaticEncoder(tokenizer, 0)
    with pytest.raises(InputError, match="max_length"):
        StaticEncoder(tokenizer, 4, 0)
    with pytest.raises(InputError, match="cannot load"):
        Encoder.from_pretrained(tmp_path)
    StaticEncoder(tokenizer, 4).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="static"):
        Encoder.from_pretrained(tmp_path, pooling="cls")


def test_the_tokenizer_splits_identifiers_into_words(tokenizer):
    text = "HTTPServer_name getName getname"
    words = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    assert words == "http server name get name getname"
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (0, 1)


def test_the_same_texts_give_the_same_tokenizer_of_at_most_the_size_asked_for():
    texts = ["alpha beta gamma delta", "alpha gamma", "beta delta epsilon"] * 5
    first, again = learn_tokenizer(texts, 40), learn_tokenizer(iter(texts), 40)
    assert first.get_vocab() == again.get_vocab()
    assert len(first) <= 40
    with pytest.raises(InputError, match="no text"):
        learn_tokenizer([])
    with pytest.raises(InputError, match="vocabulary_size"):
        learn_tokenizer(texts, 1)


def test_importing_the_encoder_pulls_in_neither_transformers_nor_datasets():
    heavy = ("transformers", "datasets", "tokenizers")
    code = f"import sys, tileloss.encoder; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
