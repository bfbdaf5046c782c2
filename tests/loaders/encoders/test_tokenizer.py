"""Tokenizers made of GGUF metadata give the ids of the tokenizers that the metadata were made of.

The oracles: SentencePiece models, trained here or bundled with the host; the host's bundled
tokenizers; llama.cpp's vocabulary files with the ids it expects. Metadata go through a real GGUF
file, written as llama.cpp 0.5.0 converts such a tokenizer.
"""
import base64
import importlib.util
import inspect
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import comfy.text_encoders
import gguf
import pytest
import sentencepiece
import tokenizers
import torch
from comfy.text_encoders.flux import Mistral3Tokenizer
from comfy.text_encoders.gemma4 import _Gemma4Tokenizer
from comfy.text_encoders.gpt_oss import LensGptOssTokenizer, _GptOssRawTokenizer
from comfy.text_encoders.spiece_tokenizer import SPieceTokenizer
from pack_api import open_weights
from transformers.integrations.mistral import MistralConverter

from devtools.files.gguf_files import write_all
from devtools.host.environment import LLAMA_CPP
from featherweight.loaders.encoders.tokenizer import (
    O200K_WORDS,
    TEKKEN_WORDS,
    sentencepiece_model,
    tekken_model,
    tokenizer_json,
)

HOST_TOKENIZERS = Path(comfy.text_encoders.__path__[0])
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = gguf.TokenType

TEXTS = [
    "",
    " ",
    "a photo of a cat, 4k, highly detailed",
    "   three spaces before, two  inside and a tab\tthere, some after   ",
    "one line\n\ntwo lines\r\n\r\n\r\n  and an indented one\n",
    "Ångström naïve façade ﬁne №5 ½ ＡＢＣ e\u0301 ñ",
    "Съешь ещё этих мягких французских булок",
    "一只猫坐在红色的垫子上。日本語のテキスト、한국어 문장",
    "قطة جميلة تجلس على السجادة עברית हिन्दी ภาษาไทย",
    "🙂 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 ☕️",
    "Donaudampfschifffahrtsgesellschaftskapitänsmützenabzeichen" * 4,
    "1234567890 3.14159 0x7f 10,000,000",
    "it's DON'T we'll I'Ve XMLHttpRequest snake_case camelCase <b>html</b> (a:1.2) [x]",
    "control \x00\x01\x7f zero\u200bwidth \u00a0 \u3000 wide",
    "<unk> <s> </s> <pad> <mask> [PAD998] <0x41>",
]
MARKED = [
    "<start_of_turn>user\nHello  world<end_of_turn>\n<start_of_turn>model\n",
    "<bos><eos><unused0> <start_of_turn><end_of_turn>",
]


def metadata_of(path, model, tokens, types, scores=None, merges=None, roles=(), pre=None, **flags):
    """The metadata of a GGUF file with this vocabulary. roles: (gguf-py's name of a special token,
    id)."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types([int(type_) for type_ in types])
    if scores is not None:
        writer.add_token_scores(scores)
    if merges is not None:
        writer.add_token_merges(merges)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    for role, index in roles:
        getattr(writer, f"add_{role}_token_id")(index)
    for name, value in flags.items():
        getattr(writer, f"add_{name}")(value)
    write_all(writer)
    return open_weights(path).metadata


def charsmap_of(model: bytes) -> bytes:
    """`normalizer_spec.precompiled_charsmap` (fields 3 and 2) of a SentencePiece model."""
    def fields(message):
        position, varint = 0, 0
        def read():
            nonlocal position
            value = shift = 0
            while True:
                byte = message[position]
                value, shift, position = value | (byte & 127) << shift, shift + 7, position + 1
                if byte < 128:
                    return value
        while position < len(message):
            number, kind = divmod(read(), 8)
            length = {0: 0, 5: 4, 1: 8}.get(kind)
            varint = read() if kind in (0, 2) else 0
            length = varint if length is None else length
            yield number, message[position:position + length]
            position += length
    normalizer = next(value for number, value in fields(model) if number == 3)
    return next((value for number, value in fields(normalizer) if number == 2), b"")


def vocabulary_of(model: bytes, rows: int):
    """(tokens, types, scores) as llama.cpp's converter reads them from a SentencePiece model,
    filled up to `rows`."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokens = [f"[PAD{index}]" for index in range(rows)]
    types, scores = [UNUSED] * rows, [-10000.0] * rows
    for index in range(len(processor)):
        tokens[index], scores[index] = processor.id_to_piece(index), processor.get_score(index)
        types[index] = (
            UNKNOWN
            if processor.is_unknown(index)
            else CONTROL
            if processor.is_control(index)
            else UNUSED
            if processor.is_unused(index)
            else BYTE
            if processor.is_byte(index)
            else NORMAL
        )
    return tokens, types, scores


def trained(**options) -> bytes:
    """A small SentencePiece model of the texts and of this file."""
    sentences = [
        line
        for text in [*TEXTS, *MARKED, Path(__file__).read_text(encoding="utf-8")]
        for line in text.splitlines()
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sentences * 3),
                                             model_writer=model, hard_vocab_limit=False,
                                             minloglevel=2, num_threads=1, **options)
    return model.getvalue()


def same_ids(original, rebuilt, texts=TEXTS):
    for text in texts:
        assert rebuilt(text) == original(text), text
        ids = original(text)["input_ids"]
        assert rebuilt.decode(ids) == original.decode(ids)


UMT5 = {
    "model_type": "unigram", "vocab_size": 700, "byte_fallback": True, "pad_id": 0, "eos_id": 1,
    "unk_id": 2, "bos_id": 3
}
GEMMA = {
    "model_type": "bpe", "vocab_size": 900, "byte_fallback": True,
    "normalization_rule_name": "identity", "add_dummy_prefix": False,
    "remove_extra_whitespaces": False, "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3,
    "pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>", "user_defined_symbols": [
        "<mask>", "<unused0>", "<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "▁▁", "▁▁▁"
    ]
}


@pytest.mark.parametrize(
    "options",
    [
        {"normalization_rule_name": "nmt_nfkc"},
        {"normalization_rule_name": "nmt_nfkc_cf", "byte_fallback": False},
        {
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "add_dummy_prefix": False,
        },
    ],
    ids=str,
)
def test_a_unigram_model_gives_the_ids_of_the_one_it_was_made_of(options, tmp_path):
    model = trained(**UMT5 | options)
    tokens, types, scores = vocabulary_of(model, 1000)
    metadata = metadata_of(
        tmp_path / "t5.gguf",
        "t5",
        tokens,
        types,
        scores,
        roles=[("eos", 1), ("unk", 2), ("pad", 0)],
        pre="default",
        add_space_prefix=options.get("add_dummy_prefix", True),
        precompiled_charsmap=charsmap_of(model),
        remove_extra_whitespaces=options.get("remove_extra_whitespaces", True),
    )
    same_ids(SPieceTokenizer(model), SPieceTokenizer(sentencepiece_model(metadata)))


def test_added_tokens_of_t5_stay_whole(tmp_path):
    model = trained(**UMT5)
    original = SPieceTokenizer(model)
    tokens, types, scores = vocabulary_of(model, 1000)
    tokens[997], types[997], scores[997] = "<extra_id_0>", USER_DEFINED, -1000.0
    metadata = metadata_of(tmp_path / "t5.gguf", "t5", tokens, types, scores,
                           precompiled_charsmap=charsmap_of(model))
    rebuilt = SPieceTokenizer(sentencepiece_model(metadata))
    assert rebuilt("<extra_id_0>")["input_ids"][-2:] == [997, original("")["input_ids"][0]]


def test_a_gemma_file_gives_the_ids_of_its_model_though_the_converter_changed_its_tokens(tmp_path):
    model = trained(**GEMMA)
    tokens, types, scores = vocabulary_of(model, 1000)
    for index, token in enumerate(tokens):  # those that tokenizer_config.json lists
        if token in (
            "<pad>",
            "<eos>",
            "<bos>",
            "<unk>",
            "<mask>",
            "<unused0>",
            "<start_of_turn>",
            "<end_of_turn>",
        ):
            types[index], scores[index] = CONTROL, -1000.0
        elif token in ("\n", "\n\n", "▁▁", "▁▁▁"):
            tokens[index], types[index], scores[index] = (
                token.replace("▁", " "),
                USER_DEFINED,
                -1000.0,
            )
    metadata = metadata_of(tmp_path / "gemma.gguf", "llama", tokens, types, scores,
                           roles=[("bos", 2), ("eos", 1), ("unk", 3),
                                  ("pad", 0)], pre="default", add_space_prefix=False)
    as_gemma = {
        "add_bos": True, "add_eos": False,
        "special_tokens": {"<end_of_turn>": tokens.index("<end_of_turn>")}
    }
    same_ids(SPieceTokenizer(model, **as_gemma),
             SPieceTokenizer(sentencepiece_model(metadata), **as_gemma), TEXTS + MARKED)


def test_the_hosts_model_of_pile_t5_survives_a_gguf_file(tmp_path):
    model = (HOST_TOKENIZERS / "t5_pile_tokenizer" / "tokenizer.model").read_bytes()
    tokens, types, scores = vocabulary_of(model, 32128)
    metadata = metadata_of(
        tmp_path / "t5.gguf",
        "llama",
        tokens,
        types,
        scores,
        roles=[("bos", 1), ("eos", 2)],
        pre="default",
    )
    same_ids(SPieceTokenizer(model), SPieceTokenizer(sentencepiece_model(metadata)))


def test_tokens_may_be_empty_or_there_twice_and_a_charsmap_signed(tmp_path):
    model = trained(**UMT5)
    tokens, types, scores = vocabulary_of(model, 1000)
    tokens[998:], types[998:] = ["", tokens[600]], [NORMAL] * 2
    metadata = {
        "tokenizer.ggml.model": "t5", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types, "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.remove_extra_whitespaces": True,
        "tokenizer.ggml.precompiled_charsmap": [(byte ^ 128) - 128 for byte in charsmap_of(model)]
    }
    same_ids(SPieceTokenizer(model), SPieceTokenizer(sentencepiece_model(metadata)))


def test_t5_gets_the_ids_of_the_hosts_own_tokenizer(tmp_path):
    content = json.loads(
        (HOST_TOKENIZERS / "t5_tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    tokens, scores = (list(column) for column in zip(*content["model"]["vocab"]))
    types = [CONTROL, CONTROL, UNKNOWN] + [NORMAL] * (len(tokens) - 3)
    charsmap = next(part["precompiled_charsmap"] for part in content["normalizer"]["normalizers"]
                    if len(part) == 2)
    metadata = metadata_of(
        tmp_path / "t5.gguf",
        "t5",
        tokens,
        types,
        scores,
        roles=[("eos", 1), ("unk", 2), ("pad", 0)],
        pre="default",
        add_space_prefix=True,
        remove_extra_whitespaces=True,
        precompiled_charsmap=base64.b64decode(charsmap),
    )
    original = tokenizers.Tokenizer.from_str(json.dumps(content))
    rebuilt = SPieceTokenizer(sentencepiece_model(metadata))
    for text in TEXTS[:-1]:  # in the last one Hugging Face cuts out "</s>", SentencePiece does not
        assert rebuilt(text)["input_ids"] == original.encode(text).ids, text


@pytest.fixture(scope="module")
def llama3():
    """A tokenizer.json with a vocabulary of bytes: the host's Llama 3, cut to its first tokens for
    speed.

    " cat" is left without merges: such a word is found whole. One added token is not special.
    """
    content = json.loads(
        (HOST_TOKENIZERS / "llama_tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    model, size = content["model"], 20000
    model["vocab"] = {token: index for token, index in model["vocab"].items() if index < size}
    merged = model["vocab"].keys() - {"Ġcat"}
    model["merges"] = [
        merge for merge in model["merges"]
        if {*merge.split(" "), merge.replace(" ", "")} <= merged
    ]
    for index, token in enumerate(content["added_tokens"]):
        token["id"] = size + index
        token["special"] = index > 0
    return content


def with_words(content: dict, pattern: str) -> tokenizers.Tokenizer:
    """The tokenizer, cutting texts into words by another pattern."""
    content = json.loads(json.dumps(content))
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def llama_cpp_file(name: str) -> Path:
    path = LLAMA_CPP / name
    if not path.is_file():
        pytest.skip(f"no {path.name} of llama.cpp: `python3 dev.py test` downloads it")
    return path


@pytest.mark.parametrize(("case", "pattern"), [("TEKKEN", TEKKEN_WORDS), ("GPT4O", O200K_WORDS)])
def test_words_are_cut_by_the_pattern_of_the_original_tokenizer(case, pattern):
    source = llama_cpp_file("src/llama-vocab.cpp").read_text(encoding="utf-8")
    cited = re.search(rf'case LLAMA_VOCAB_PRE_TYPE_{case}:.*?tokenizer\.json\n\s*// (".*?"),?\n',
                      source, re.DOTALL)[1]
    assert pattern == json.loads(cited)


def test_gpt_oss_gets_a_tokenizer_of_bytes(llama3, tmp_path):
    vocabulary, added = llama3["model"]["vocab"], llama3["added_tokens"]
    tokens = [
        *vocabulary, *(token["content"] for token in added), f"[PAD{len(vocabulary) + len(added)}]"
    ]
    types = [
        *[NORMAL] * len(vocabulary),
        *(CONTROL if token["special"] else USER_DEFINED for token in added), UNUSED
    ]
    metadata = metadata_of(tmp_path / "gpt.gguf", "gpt2", tokens, types,
                           merges=llama3["model"]["merges"], pre="gpt-4o")
    rebuilt = LensGptOssTokenizer(
        tokenizer_data={"tokenizer_json": tokenizer_json(metadata)}).tokenizer
    original = with_words(llama3, O200K_WORDS)
    for text in [
            *TEXTS,
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|> [PAD20259]"
    ]:
        expected = original.encode(text, add_special_tokens=False).ids
        assert rebuilt(text)["input_ids"] == expected, text
        for without in (True, False):
            decoded = original.decode(expected, skip_special_tokens=without)
            assert rebuilt.decode(expected, skip_special_tokens=without) == decoded


Reading = tuple[Callable[[str], list[int]], str]  # text -> tokens, pattern of words


def _reading(tokenizer: tokenizers.Tokenizer) -> Reading:
    words = json.loads(tokenizer.to_str())["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids, words


def transformers_reader(model: torch.Tensor, path: Path) -> Reading:
    """What transformers since 5.15 makes of a tekken.json. The host calls it as it was before."""
    path.write_bytes(model.numpy().tobytes())
    return _reading(MistralConverter(str(path)).converted())


def host_reader(model: torch.Tensor, path: Path) -> Reading:
    """What the host makes of it, from 0.33 on without transformers."""
    tokenizer = Mistral3Tokenizer(tokenizer_data={"tekken_model": model}).tokenizer
    if HAS_BPE:
        return lambda text: tokenizer(text)["input_ids"], bpe_tokenizer._LLAMA_PATTERN
    return _reading(tokenizer.backend_tokenizer)


HAS_BPE = importlib.util.find_spec("comfy.text_encoders.bpe_tokenizer") is not None
if HAS_BPE:
    from comfy.text_encoders import bpe_tokenizer
HOST_READS = HAS_BPE or "vocab" in inspect.signature(MistralConverter).parameters
TRANSFORMERS_READS = "vocab" not in inspect.signature(MistralConverter).parameters


@pytest.mark.parametrize(
    "read",
    [
        pytest.param(
            host_reader,
            marks=pytest.mark.skipif(
                not HOST_READS, reason="the host needs a transformers before 5.15"
            ),
        ),
        pytest.param(
            transformers_reader,
            marks=pytest.mark.skipif(not TRANSFORMERS_READS, reason="needs transformers 5.15"),
        ),
    ],
)
def test_mistral_gets_a_tekken_file(read, llama3, tmp_path):
    vocabulary = list(llama3["model"]["vocab"])
    special = list(
        dict.fromkeys(
            ["<unk>", "<s>", "</s>", *(token["content"] for token in llama3["added_tokens"])]))
    tokens = [*special, *vocabulary, "▁not of bytes"]
    types = [CONTROL] * len(special) + [NORMAL] * (len(vocabulary) + 1)
    metadata = metadata_of(tmp_path / "mistral.gguf", "gpt2", tokens, types,
                           merges=llama3["model"]["merges"], pre="tekken")
    made = tekken_model(metadata)
    content = json.loads(made.numpy().tobytes())
    assert content["special_tokens"] == [
        {"rank": rank, "token_str": text} for rank, text in enumerate(special)]
    assert content["config"]["default_num_special_tokens"] == len(special)
    assert len(content["vocab"]) == len(tokens) - len(special)
    encode, words = read(made, tmp_path / "tekken.json")
    # the host cuts by Llama 3's pattern, whatever the file says
    assert read is host_reader or words == TEKKEN_WORDS
    original = with_words(llama3, words)
    assert encode("<s>text</s>")[::2] == [1, 2]
    for text in [*TEXTS[:-1], "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"]:
        names = original.encode(text, add_special_tokens=False).tokens
        assert encode(text) == [tokens.index(name) for name in names], text


@pytest.mark.parametrize(
    ("name", "build", "host_class"),
    [
        ("llama-spm", sentencepiece_model, SPieceTokenizer),
        ("phi-3", sentencepiece_model, SPieceTokenizer),
        ("gemma-4", tokenizer_json, _Gemma4Tokenizer),
        ("llama-bpe", tokenizer_json, _GptOssRawTokenizer),
        ("qwen2", tokenizer_json, _GptOssRawTokenizer),
    ],
)
def test_vocabularies_of_llama_cpp_give_the_ids_it_expects(name, build, host_class):
    path = llama_cpp_file(f"models/ggml-vocab-{name}.gguf")
    texts = path.with_name(f"{path.name}.inp").read_text(
        encoding="utf-8").split("\n__ggml_vocab_test__\n")
    expected = path.with_name(f"{path.name}.out").read_text(encoding="utf-8").split("\n")
    options = {"add_eos": False} if build is sentencepiece_model else {}
    rebuilt = host_class(build(open_weights(path).metadata), **options)
    for text, line in zip(texts, expected):
        assert rebuilt(text)["input_ids"] == [int(index) for index in line.split()], text


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (sentencepiece_model, "model"),
        (sentencepiece_model, "tokens"),
        (sentencepiece_model, "token_type"),
        (sentencepiece_model, "scores"),
        (sentencepiece_model, "unknown_token_id"),
        (tokenizer_json, "model"),
        (tokenizer_json, "tokens"),
        (tokenizer_json, "token_type"),
        (tokenizer_json, "merges"),
        (tekken_model, "tokens"),
        (tekken_model, "token_type"),
        (tekken_model, "merges"),
    ],
)
def test_what_the_metadata_lack_is_named(build, key):
    vocabulary = {
        "model": "llama", "tokens": ["a", "b"], "token_type": [1, 1], "scores": [0.0, 0.0],
        "merges": ["a b"]
    }
    with pytest.raises(KeyError) as error:
        build(
            {f"tokenizer.ggml.{name}": value for name, value in vocabulary.items() if name != key})
    assert error.value.args == (f"tokenizer.ggml.{key}",)
