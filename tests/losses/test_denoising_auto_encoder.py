"""The denoising auto-encoder is sentence-transformers' in value, gradients, tied weights, errors and settings."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from tileloss.encoder import TransformerEncoder
from tileloss.errors import InputError, KindError, MissingError, ShapeError
from tileloss.losses import DenoisingAutoEncoderLoss

st = pytest.importorskip("sentence_transformers")
oracle = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
transformers = pytest.importorskip("transformers")

KINDS = (DenoisingAutoEncoderLoss, oracle.DenoisingAutoEncoderLoss)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a GPT-2 that reads characters, of the tiny BERT's hidden size; it has no padding token."""
    folder = tmp_path_factory.mktemp("gpt2")
    vocabulary = {"<|endoftext|>": 0} | {character: i for i, character in enumerate("Ġw0123456789", start=1)}
    tokenizer = transformers.GPT2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder)
    config = transformers.GPT2Config(
        vocab_size=len(vocabulary), n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(3)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def make(kind: type, model: Any, *options: Any, dtype: torch.dtype = torch.double) -> Any:
    """A loss whose new weights are drawn from a fixed seed."""
    torch.manual_seed(4)
    return kind(model, *options).to(dtype).train()


def train_once(loss: nn.Module, columns: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The value of one step from a fixed seed, and the gradients of all parameters."""
    torch.manual_seed(2)
    loss.zero_grad()
    value = loss([dict(x) for x in columns], None)
    value.backward()
    return {"value": value.detach()} | {name: p.grad for name, p in loss.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    largest = max(x.norm() for x in expected.values())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert (found[name] - value).norm() <= tolerance * (value.norm() + 1e-3 * largest), name


def columns(model: Any, texts: Callable[..., list[str]], rows: int = 9) -> list[dict[str, Any]]:
    whole = texts(rows)
    return [model.preprocess([" ".join(x.split()[::2]) for x in whole]), model.preprocess(whole)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.double, 1e-8), (torch.float32, 2e-4)], ids=str)
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("decoder", ["tied", "other_bert", "gpt2"])
def test_it_trains_encoder_and_decoder_as_the_oracle_does(
    decoder: str, padding: str, dtype: torch.dtype, tolerance: float, request: Any, tiny_encoder: Any, texts: Any
) -> None:
    options = () if decoder == "tied" else (str(request.getfixturevalue(decoder)), False)
    results = []
    for kind in KINDS:
        model = tiny_encoder()
        model.tokenizer.padding_side = padding
        loss = make(kind, model, *options, dtype=dtype)
        assert loss.need_retokenization is (decoder == "gpt2")
        results.append(train_once(loss, columns(model, texts)))
        assert len([name for name in results[-1] if name.startswith("encoder")]) > 20
        assert any("crossattention" in name for name in results[-1])
    assert_close(*results, tolerance)


def test_tied_weights_are_shared_and_the_oracles(tiny_encoder: Any) -> None:
    results = []
    for kind in KINDS:
        model = tiny_encoder()
        loss = make(kind, model)
        parameters = dict(loss.decoder.base_model.named_parameters())
        encoder = dict(model.transformers_model.named_parameters())
        shared = {name for name, parameter in encoder.items() if parameters.get(name) is parameter}
        assert len(shared) == len(encoder) - 2, "all but the pooler's, which decoders lack"
        results.append((shared, {name: p.detach() for name, p in loss.named_parameters()}))
    assert results[0][0] == results[1][0]
    assert results[0][1].keys() == results[1][1].keys()
    for name, parameter in results[1][1].items():
        assert torch.equal(results[0][1][name], parameter)


def test_untied_weights_are_not_shared(tiny_encoder: Any, tiny_bert: Path) -> None:
    loss = make(DenoisingAutoEncoderLoss, tiny_encoder(), str(tiny_bert), False)
    encoder = {id(parameter) for parameter in loss.encoder.parameters()}
    assert not any(id(parameter) in encoder for parameter in loss.decoder.parameters())


def test_a_vocabulary_that_has_grown(
    tiny_encoder: Any, tiny_bert: Path, texts: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for options, message in (((), "decoder now has them too"), ((str(tiny_bert), False), "decoder may need them too")):
        results = []
        for kind in KINDS:
            model = tiny_encoder()
            model.tokenizer.add_tokens(["new"])
            torch.manual_seed(4)
            model.transformers_model.resize_token_embeddings(len(model.tokenizer))
            loss = make(kind, model, *options)
            assert loss.decoder.config.vocab_size == len(loss.tokenizer_decoder)
            assert len(loss.tokenizer_decoder) == len(model.tokenizer) - bool(options)
            results.append(train_once(loss, columns(model, texts)))
        assert_close(*results, 1e-8)
        assert message in caplog.text


def test_texts_are_tokenised_again_as_the_oracle_does(tiny_encoder: Any, gpt2: Path, texts: Any) -> None:
    made = []
    for kind in KINDS:
        model = tiny_encoder()
        loss = make(kind, model, str(gpt2), False)
        made.append(loss.retokenize(model.preprocess(texts(5))))
        assert loss.tokenizer_decoder.pad_token == "<|endoftext|>"
        assert loss.decoder.config.pad_token_id == 0
    assert made[0].keys() == made[1].keys()
    assert torch.equal(made[0]["input_ids"], made[1]["input_ids"])
    assert loss.tokenizer_decoder.decode(made[0]["input_ids"][0], skip_special_tokens=True) == texts(5)[0]


def test_under_no_grad_and_with_nothing_but_padding(tiny_encoder: Any, texts: Any) -> None:
    for rows in (1, 9):
        values = []
        for kind in KINDS:
            model = tiny_encoder()
            loss = make(kind, model).eval()
            features = columns(model, texts, rows)
            if rows == 1:
                features[1]["input_ids"].zero_()
            with torch.no_grad():
                values.append(loss(features, None))
        torch.testing.assert_close(*values, equal_nan=True)
        assert values[0].isnan() == (rows == 1)


def test_our_own_encoder_has_all_that_it_takes(tiny_bert: Path, tiny_encoder: Any, texts: Any) -> None:
    results = []
    for model in (TransformerEncoder.from_pretrained(tiny_bert).train(), tiny_encoder()):
        loss = make(DenoisingAutoEncoderLoss, model)
        found = train_once(loss, columns(model, texts))
        results.append({name.replace("0.auto_model", "transformer").replace("0.model", "transformer"): x
                        for name, x in found.items()})  # fmt: skip
    assert_close(*results, 1e-8)


def test_a_trainer_finds_the_model_to_wrap(tiny_encoder: Any) -> None:
    model = tiny_encoder()
    loss = DenoisingAutoEncoderLoss(model)
    assert loss.model is loss.encoder is model
    assert [name for name, _ in loss.named_children()] == ["model", "decoder"]
    loss.model = wrapped = nn.Sequential(model)
    assert loss.encoder is wrapped


def test_settings_are_the_oracles(tiny_encoder: Any, other_bert: Path, gpt2: Path) -> None:
    for options in ((), (str(other_bert), False), (str(gpt2), False)):
        ours, theirs = (make(kind, tiny_encoder(), *options) for kind in KINDS)
        assert list(ours.get_config_dict().items()) == list(theirs.get_config_dict().items())
        assert ours.citation.split(",")[0] == theirs.citation.split(",")[0]
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert type(ours.decoder) is type(theirs.decoder)


def test_constructor_refuses_what_the_oracle_refuses(
    tiny_encoder: Any, gpt2: Path, tmp_path: Path, other_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(kinds: Any, message: str, model: Any, *options: Any) -> None:
        for kind, error in zip(KINDS, kinds, strict=True):
            with pytest.raises(error, match=message if kind is DenoisingAutoEncoderLoss else None):
                kind(model, *options)
        assert issubclass(kinds[0], kinds[1])

    refused((MissingError, AssertionError), "needs decoder_name_or_path", tiny_encoder(), None, False)
    wide = transformers.BertConfig.from_pretrained(other_bert, hidden_size=32)
    wide.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(other_bert).save_pretrained(tmp_path)
    transformers.BertModel(wide).save_pretrained(tmp_path)
    refused((KindError, AssertionError), "Hidden sizes do not match", tiny_encoder(), str(tmp_path), False)
    encoder = tiny_encoder()
    monkeypatch.setattr(encoder.transformers_model.config, "_name_or_path", str(gpt2))
    refused((KindError, AssertionError), "Tied weights need one tokenizer", encoder)
    clip = tmp_path / "no language model"
    transformers.AutoTokenizer.from_pretrained(other_bert).save_pretrained(clip)
    transformers.ViTConfig(hidden_size=16).save_pretrained(clip)
    refused((InputError, ValueError), "as a causal language model", tiny_encoder(), str(clip), False)
    refused((MissingError, AttributeError), "transformers_model", nn.Sequential(nn.Identity()))


def test_decoders_that_would_not_see_the_embeddings_are_refused(
    tiny_encoder: Any, other_bert: Path, tmp_path: Path
) -> None:
    config = transformers.LlamaConfig(
        vocab_size=42, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(other_bert).save_pretrained(tmp_path)
    with pytest.raises(KindError, match="LlamaForCausalLM has no cross-attention"):
        DenoisingAutoEncoderLoss(tiny_encoder(), str(tmp_path), False)


def test_static_embeddings_are_refused(tiny_encoder: Any) -> None:
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    static = st.SentenceTransformer(modules=[StaticEmbedding(tiny_encoder().tokenizer, embedding_dim=4)], device="cpu")
    for kind in KINDS:
        with pytest.raises(
            ValueError, match="not compatible with a SentenceTransformer model based on a StaticEmbedding"
        ):
            kind(static)


@pytest.mark.usefixtures("process_group")
def test_tied_weights_of_a_sharded_encoder_are_refused(tiny_encoder: Any, tiny_bert: Path, texts: Any) -> None:
    model = tiny_encoder()
    tied, untied = DenoisingAutoEncoderLoss(model), DenoisingAutoEncoderLoss(model, str(tiny_bert), False)
    tied(columns(model, texts), None)
    for layer in model[0].auto_model.encoder.layer:
        fully_shard(layer, mesh=dist.init_device_mesh("cpu", (1,)))
    with pytest.raises(InputError, match="sharded after its weights were tied"):
        tied(columns(model, texts), None)
    assert untied(columns(model, texts), None).isfinite()


@pytest.mark.parametrize("count", [1, 3])
def test_other_columns_are_refused(count: int, tiny_encoder: Any, texts: Any) -> None:
    for kind, error in zip(KINDS, (ShapeError, ValueError), strict=True):
        model = tiny_encoder()
        with pytest.raises(error):
            make(kind, model)([model.preprocess(texts(3))] * count, None)


def test_a_decoder_beside_tied_weights_is_said_to_be_useless(
    tiny_encoder: Any, other_bert: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        loss = DenoisingAutoEncoderLoss(tiny_encoder(), str(other_bert))
    assert "has no effect" in caplog.text
    assert loss.get_config_dict()["decoder_name_or_path"] != str(other_bert)
