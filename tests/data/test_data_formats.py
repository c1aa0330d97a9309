"""Formats to token ids and labels: masks token by token, truncation, counts, and every bad row."""

import dataclasses
import time

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qlora_jax.data import FORMATS, IGNORED, Rows, check_tokens, encode_prompt, load_rows, tokenize_rows
from qlora_jax.data.chat_template import render
from qlora_jax.errors import UserError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
PAD, BOS, EOS, _, IM_END = range(5)
ALPACA_PLAIN = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName a fish.\n\n### Response: "
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName a fish.\n\n### Input:\nin {fresh} water\n\n### Response: "
)


def byte_tokenizer(*, template=CHATML, trim_offsets=False, merges=(), **special):
    """One token a byte, plus the special tokens and any merges."""
    vocab = {byte: i + len(SPECIALS) for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in merges:
        vocab[left + right] = len(vocab) + len(SPECIALS)
    backend = Tokenizer(models.BPE({**{s: i for i, s in enumerate(SPECIALS)}, **vocab}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    backend.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **special}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{k: v for k, v in special.items() if v}, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def rows_of(*rows):
    return Rows(list(rows), [f"rows.jsonl line {i}" for i in range(1, len(rows) + 1)], "rows.jsonl")


def one(row, tokenizer, **options):
    (example,), report = tokenize_rows(rows_of(row), tokenizer=tokenizer, **options)
    return example, report


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def trained_text(example, tokenizer):
    """The trained stretches, decoded, each as one string."""
    stretches, last = [], None
    for i in np.flatnonzero(example.labels != IGNORED):
        if last is None or i != last + 1:
            stretches.append([])
        stretches[-1].append(int(example.input_ids[i]))
        last = i
    return [tokenizer.decode(s) for s in stretches]


def user_parts(last):
    """A message of two parts, the first of them text."""
    return {"role": "user", "content": [{"type": "text", "text": "a"}, last]}


SOURCE_TARGET = [
    ("input-output", {"input": "Hi", "output": "Hö!"}, "Hi", "Hö!"),
    ("prompt-completion", {"prompt": "Hi", "completion": " Ho"}, "Hi", " Ho"),
    ("question-answer", {"question": "Who?", "answer": "I."}, "Who?", "I."),
    ("alpaca", {"instruction": "Name a fish.", "output": "Cod"}, ALPACA_PLAIN, "Cod"),
    ("alpaca", {"instruction": "Name a fish.", "input": "", "output": "Cod"}, ALPACA_PLAIN, "Cod"),
    ("alpaca", {"instruction": "Name a fish.", "input": None, "output": "Cod"}, ALPACA_PLAIN, "Cod"),
    ("alpaca", {"instruction": "Name a fish.", "input": "in {fresh} water", "output": "Cod"}, ALPACA_INPUT, "Cod"),
    ("alpaca-clean", {"instruction": "Name a fish.", "input": "", "output": "Cod"}, ALPACA_PLAIN, "Cod"),
    ("oasst1", {"text": "### Human: Hi### Assistant: Ho"}, "", "### Human: Hi### Assistant: Ho"),
    ("oasst1", {"input": "", "output": "### Human: Hi### Assistant: Ho"}, "", "### Human: Hi### Assistant: Ho"),
    ("oasst1", {"input": "### Human: Hi ### Assistant:", "output": "Ho"}, "", "### Human: Hi ### Assistant: Ho"),
]


@pytest.mark.parametrize(("name", "row", "source", "target"), SOURCE_TARGET)
@pytest.mark.parametrize("train_on_source", [False, True])
def test_source_and_target_token_by_token(tokenizer, name, row, source, target, train_on_source):
    example, report = one(row, tokenizer, dataset_format=name, train_on_source=train_on_source)
    given, learnt = [BOS, *ids(tokenizer, source)], [*ids(tokenizer, target), EOS]
    assert example.input_ids.dtype == example.labels.dtype == np.int32
    assert example.input_ids.tolist() == given + learnt
    masked = given[1:] if train_on_source else [IGNORED] * (len(given) - 1)
    assert example.labels.tolist() == [IGNORED, *masked, *learnt]
    assert example.labels[-1] == EOS
    assert PAD not in example.input_ids
    assert (report.n_tokens, report.n_trained) == (len(example), example.n_trained)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "text": "x"},
            "messages",
        ),
        ({"instruction": "a", "input": "b", "output": "c", "text": "d"}, "alpaca"),
        ({"input": "b", "output": "c", "id": 3}, "input-output"),
        ({"prompt": "b", "completion": "c", "text": "d"}, "prompt-completion"),
        ({"question": "b", "answer": "c", "id": 3}, "question-answer"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "id": 3}, "sharegpt"),
        ({"text": "d"}, "oasst1"),
    ],
)
def test_format_is_inferred_from_the_columns_and_reported(tokenizer, row, name):
    _, report = one(row, tokenizer)
    assert report.dataset_format == name and report.format_inferred
    assert f"format {name} (inferred from the columns)" in str(report)
    unused = {"messages": "text", "alpaca": "text", "prompt-completion": "text", "oasst1": None}.get(name, "id")
    assert (unused is None) or f"columns that the format does not use: {unused}" in str(report)


def test_unused_columns_are_reported_once_for_the_whole_set(tokenizer):
    rows = rows_of({"text": "a", "id": 1}, {"text": "b", "lang": "en"}, {"text": "c", "id": 3})
    _, report = tokenize_rows(rows, tokenizer=tokenizer)
    assert str(report).count("columns that the format does not use: id, lang") == 1


@pytest.mark.parametrize(
    ("rows", "name", "message"),
    [
        ([{"a": "b"}], None, r"rows\.jsonl: the columns 'a' fit no format.*with `dataset_format` \("),
        ([{"text": "b"}], "guess", r"`dataset_format=guess` is unknown"),
        ([{"text": "b"}], "chip2", r"not supported yet"),
        ([{"txt": "b"}], "oasst1", r"rows\.jsonl line 1: column 'text' is missing.*'txt'"),
        ([{"input": "a"}, {"output": "b"}], None, r"line 1: column 'output' is missing, and no row has all"),
        ([{"instruction": "a"}], "alpaca", r"line 1: column 'output' is missing.*'alpaca' needs \('instruction'"),
        ([{"input": "a", "output": 3}], None, r"line 1: column 'output' must be text, not int"),
        ([{"input": "a", "output": None}], None, r"line 1: column 'output' must be text, not null"),
        ([{"messages": "hi"}], None, r"line 1: column 'messages' must be a list"),
        ([{"messages": []}], None, r"at least one"),
        ([{"messages": [{"role": "user"}]}], None, r"line 1: message 1 must be an object with 'role' and 'content'"),
        ([{"messages": [{"role": "human", "content": "a"}]}], None, r"message 1 has role 'human'; use one of"),
        ([{"messages": [{"role": "user", "content": None}]}], None, r"message 1: column 'content' must be text"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], None, r"starts with the assistant"),
        ([{"prompt": "a", "completion": ["b"]}], None, r"line 1: column 'completion' must be text, not list"),
        ([{"question": "a", "answer": 3}], None, r"line 1: column 'answer' must be text, not int"),
        ([{"messages": [user_parts({"type": "image"})]}], None, r"message 1: part 2 of its content is of type 'image'"),
        ([{"messages": [user_parts({"type": "thought", "text": "b"})]}], None, r"part 2 of its content is of type 'th"),
        ([{"messages": [user_parts({"text": None})]}], None, r"line 1, message 1: part 2 of its content is no text"),
        ([{"messages": [user_parts("b")]}], None, r"line 1, message 1: part 2 of its content is no text; only"),
        ([{"conversations": []}], None, r"line 1: column 'conversations' must be a list"),
        ([{"conversations": ["a"]}], None, r"line 1: turn 1 must be an object with 'from' and 'value'"),
        (
            [{"conversations": [{"from": "me", "value": "a"}]}],
            None,
            r"line 1: turn 1 is from 'me'; use one of",
        ),
        ([{"conversations": [{"from": ["gpt"], "value": "a"}]}], None, r"line 1: turn 1 is from \['gpt'\]; use one"),
        ([{"conversations": [{"from": "gpt", "value": 3}]}], None, r"line 1, turn 1: column 'value' must be text"),
        ([{"conversations": [{"from": "gpt", "value": "a"}]}], None, r"line 1: .*starts with the assistant"),
    ],
)
def test_bad_rows_name_position_and_column(tokenizer, rows, name, message):
    with pytest.raises(UserError, match=message):
        tokenize_rows(rows_of(*rows), tokenizer=tokenizer, dataset_format=name)


def test_rows_that_lack_a_column_are_left_out_and_counted(tokenizer):
    rows = rows_of({"input": "a", "output": "b"}, {"input": "c"}, {"input": "d", "output": "e"}, {"output": "f"})
    examples, report = tokenize_rows(rows, tokenizer=tokenizer)
    assert [example.example_id for example in examples] == ["rows.jsonl line 1", "rows.jsonl line 3"]
    assert (report.rows_read, report.rows_used, report.lacking_column.count) == (4, 2, 2)
    assert "rows that lack a column, left out: 2 (rows.jsonl line 2, rows.jsonl line 4)" in str(report)


def test_source_and_target_are_cut_apart_and_counted(tokenizer):
    rows = rows_of(
        {"input": "abcdef", "output": "xyz"},
        {"input": "abc", "output": "uvwxyz"},
        {"input": "abc", "output": "xyz"},
        {"input": "abcdef", "output": "uvwxyz"},
    )
    examples, report = tokenize_rows(rows, tokenizer=tokenizer, source_max_len=4, target_max_len=4)
    decoded = [(tokenizer.decode(e.input_ids), trained_text(e, tokenizer)) for e in examples]
    assert decoded == [
        ("<s>abcxyz</s>", ["xyz</s>"]),
        ("<s>abcuvwx", ["uvwx"]),
        ("<s>abcxyz</s>", ["xyz</s>"]),
        ("<s>abcuvwx", ["uvwx"]),
    ]
    assert report.source_truncated.count == 2 and report.target_truncated.count == 2
    assert report.source_truncated.positions == ("rows.jsonl line 1", "rows.jsonl line 4")
    assert "rows that had source cut to source_max_len: 2 (rows.jsonl line 1, rows.jsonl line 4)" in str(report)


def test_tokenizer_without_bos_adds_none_and_says_so():
    tokenizer = byte_tokenizer(bos_token=None)
    example, report = one({"input": "a", "output": "b"}, tokenizer)
    assert tokenizer.decode(example.input_ids) == "ab</s>"
    assert "no BOS token" in str(report)
    example, _ = one({"text": "abc"}, tokenizer)
    assert trained_text(example, tokenizer) == ["bc</s>"]


def test_eos_is_trained_even_when_it_is_also_the_pad_token():
    example, _ = one({"input": "a", "output": "b"}, byte_tokenizer(pad_token="</s>"))
    assert example.labels.tolist()[-1] == EOS == example.input_ids[-1]


def test_unfit_tokenizers_are_refused():
    rows = rows_of({"input": "a", "output": "b"})
    with pytest.raises(UserError, match="no EOS token"):
        tokenize_rows(rows, tokenizer=byte_tokenizer(eos_token=None))
    with pytest.raises(UserError, match="no fast version"):
        tokenize_rows(rows, tokenizer=object())


@pytest.mark.parametrize("flag", ["source_max_len", "target_max_len"])
def test_lengths_below_one_are_refused(tokenizer, flag):
    with pytest.raises(UserError, match=f"^`{flag}=0`: must be at least 1"):
        one({"text": "a"}, tokenizer, **{flag: 0})


def chat(*contents, system=None):
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return {"messages": [{"role": "system", "content": system}] * (system is not None) + messages}


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_messages_train_the_assistant_with_its_end_of_turn_and_nothing_else(trim_offsets):
    tokenizer = byte_tokenizer(trim_offsets=trim_offsets)
    example, report = one(chat("Hi  ", "Hö 😀!", "And?", " No. ", "Bye", system="Be brief"), tokenizer)
    text = (
        "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nHi  <|im_end|>\n"
        "<|im_start|>assistant\nHö 😀!<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n"
        "<|im_start|>assistant\n No. <|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
    )
    assert tokenizer.decode(example.input_ids) == text
    # A lone space token at the start of a turn is lost where the tokenizer trims it off the offsets.
    second = "No. <|im_end|>" if trim_offsets else " No. <|im_end|>"
    assert trained_text(example, tokenizer) == ["Hö 😀!<|im_end|>", second]
    assert np.array_equal(example.labels[example.labels != IGNORED], example.input_ids[example.labels != IGNORED])
    assert np.count_nonzero(example.labels == IM_END) == 2
    assert report.rows_used == 1


def test_sharegpt_and_parts_of_text_are_the_same_as_messages(tokenizer):
    plain, _ = one(chat("Hi", "Ho", "And?", "No.", system="Be brief"), tokenizer)
    turns = [("system", "Be brief"), ("human", "Hi"), ("gpt", "Ho"), ("user", "And?"), ("assistant", "No.")]
    row = {"conversations": [{"from": origin, "value": text} for origin, text in turns]}
    assert np.array_equal(one(row, tokenizer)[0].labels, plain.labels)
    apart, report = one({"system": "Be brief", "conversations": row["conversations"][1:]}, tokenizer)
    assert np.array_equal(apart.labels, plain.labels)
    assert "does not use" not in str(report)
    row = chat("Hi", "Ho", "And?", "No.", system="Be brief")
    row["messages"][1]["content"] = [{"type": "text", "text": "H"}, {"text": "i"}]
    row["messages"][2]["content"] = [{"type": "text", "text": "Ho"}]
    assert np.array_equal(one(row, tokenizer)[0].labels, plain.labels)
    assert isinstance(row["messages"][1]["content"], list)  # the row is left as it was


def test_messages_train_on_source_trains_all_but_the_first_token(tokenizer):
    example, _ = one(chat("a", "b"), tokenizer, train_on_source=True)
    assert example.labels.tolist() == [IGNORED, *example.input_ids.tolist()[1:]]


def test_a_token_across_the_start_of_a_turn_is_not_trained():
    tokenizer = byte_tokenizer(merges=[("Ċ", "Ċ")])
    example, _ = one(chat("a", "\nb"), tokenizer)
    assert trained_text(example, tokenizer) == ["b<|im_end|>"]


def test_messages_cut_at_the_end_and_left_out_when_nothing_is_trained(tokenizer):
    rows = rows_of(chat("a", "b" * 50), chat("a" * 60, "b"), {"messages": [{"role": "user", "content": "a"}]})
    examples, report = tokenize_rows(rows, tokenizer=tokenizer, source_max_len=30, target_max_len=20)
    assert [e.example_id for e in examples] == ["rows.jsonl line 1"]
    assert len(examples[0]) == 50
    assert report.conversation_truncated.positions == ("rows.jsonl line 1", "rows.jsonl line 2")
    assert report.untrained.positions == ("rows.jsonl line 2", "rows.jsonl line 3")
    assert (report.rows_read, report.rows_used) == (3, 1)
    assert "train on nothing, left out: 2 (rows.jsonl line 2, rows.jsonl line 3)" in str(report)


def test_max_length_cuts_and_counts(tokenizer):
    rows = rows_of(
        {"input": "abcdef", "output": "xyz"}, {"input": "a", "output": "b"}, {"input": "abc" * 9, "output": "b"}
    )
    examples, report = tokenize_rows(rows, tokenizer=tokenizer, max_length=8)
    assert [len(e) for e in examples] == [8, 4]
    assert report.length_truncated.count == 2 and report.untrained.count == 1


def test_report_shows_at_most_five_positions(tokenizer):
    rows = rows_of(*[chat("a")] * 7, chat("a", "b"))
    _, report = tokenize_rows(rows, tokenizer=tokenizer)
    assert report.untrained.count == 7 and len(report.untrained.positions) == 5
    assert (
        "7 (rows.jsonl line 1, rows.jsonl line 2, rows.jsonl line 3, rows.jsonl line 4, rows.jsonl line 5, ...)"
        in str(report)
    )
    assert 2 <= len(str(report).splitlines()) <= 6


def test_nothing_left_to_train_on_is_an_error(tokenizer):
    with pytest.raises(UserError, match="none of the 2 rows trains on anything"):
        tokenize_rows(rows_of(chat("a"), chat("b")), tokenizer=tokenizer)


def test_empty_targets_are_counted(tokenizer):
    example, report = one({"input": "a", "output": ""}, tokenizer)
    assert trained_text(example, tokenizer) == ["</s>"]
    assert "empty target, only end-of-text trained: 1" in str(report)


def test_chat_template_problems_are_errors_that_name_the_row(tokenizer):
    rows = rows_of(chat("a", "b", "c", "d"))
    with pytest.raises(UserError, match="no chat template"):
        tokenize_rows(rows, tokenizer=byte_tokenizer(template=None))
    last_only = "{% for m in messages %}{% if loop.last %}!{% endif %}{{ m['content'] }}</s>{% endfor %}"
    with pytest.raises(UserError, match=r"line 1: the tokenizer's chat template renders the conversation up to"):
        tokenize_rows(rows, tokenizer=byte_tokenizer(template=last_only))
    refusing = "{{ raise_exception('no system turns') }}"
    with pytest.raises(UserError, match=r"line 1: .*refuses the messages: no system turns"):
        tokenize_rows(rows, tokenizer=byte_tokenizer(template=refusing))


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
LOOP += "{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 // 0 }}", "ZeroDivisionError: integer division or modulo by zero"),
        ("{{ messages + 1 }}", "TypeError: can only concatenate list"),
        ("{{ 10.0 ** 1000 }}", "OverflowError"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "RecursionError: maximum recursion depth"),
        ("{% for", "unexpected 'end of template'"),
        ("{{ ().__class__.__bases__ }}", "access to attribute '__class__' of 'tuple' object is unsafe"),
        (LOOP, "takes over three seconds"),
        ("{{ 10 ** (10 ** 9) }}", "takes over three seconds"),
        ("{{ 'x' * 2 ** 31 }}", "it takes over 1073741824 bytes of memory"),
        ("{{ 'x' * 2 ** 26 }}", "it renders [0-9]+ characters of messages to 67108864"),
    ],
)
def test_a_template_that_fails_or_does_not_end_is_one_sentence(template, message):
    start = time.perf_counter()
    with pytest.raises(UserError, match=f"line 1: the tokenizer's chat template .*{message}"):
        tokenize_rows(rows_of(chat("a", "b")), tokenizer=byte_tokenizer(template=template))
    assert time.perf_counter() - start < 20  # of which three on the processor, which others use too
    (example,), _ = tokenize_rows(rows_of(chat("a", "b")), tokenizer=byte_tokenizer())
    assert len(example)


def test_a_template_that_does_not_end_is_not_tried_on_every_row():
    start = time.perf_counter()
    with pytest.raises(UserError, match="takes over three seconds"):
        tokenize_rows(rows_of(*[chat("a", "b")] * 100), tokenizer=byte_tokenizer(template=LOOP), on_bad_row="skip")
    assert time.perf_counter() - start < 20


def test_renderings_are_transformers_own(tokenizer):
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m | tojson }}{{ m.tool_calls is defined }}{% endfor %}"
        "{{ add_generation_prompt }}{{ pad_token }}{% generation %}x{% endgeneration %}{{ tools is none }}"
    )
    tokenizer = byte_tokenizer(template=template)
    messages = [
        {"role": "user", "content": "ä\u2028\n", "tool_calls": None},
        {"role": "assistant", "content": "b", "reasoning_content": "why", "more": [1, 2.5, {"x": None}]},
    ]
    renders = [(2, False), (1, True)]
    expected = [
        tokenizer.apply_chat_template(messages[:n], tokenize=False, add_generation_prompt=prompt)
        for n, prompt in renders
    ]
    assert render(tokenizer, messages, renders, "here") == expected


BAD = [{"input": "a", "output": "b"}, {"input": 1, "output": "b"}, {"input": "a", "output": "\ud800"}]


def test_bad_rows_are_told_together_or_left_out_and_counted(tokenizer):
    rows = dataclasses.replace(rows_of(*BAD), bad=("rows.jsonl line 9: not valid JSON",))
    with pytest.raises(UserError) as error:
        tokenize_rows(rows, tokenizer=tokenizer)
    assert str(error.value).splitlines() == [
        "3 rows cannot be used; mend them, or leave such rows out with `on_bad_row=skip`:",
        "  rows.jsonl line 9: not valid JSON.",
        "  rows.jsonl line 2: column 'input' must be text, not int.",
        "  rows.jsonl line 3: column 'output' has half of a surrogate pair at character 0.",
    ]
    examples, report = tokenize_rows(rows, tokenizer=tokenizer, on_bad_row="skip")
    assert [example.example_id for example in examples] == ["rows.jsonl line 1"]
    assert (report.rows_read, report.rows_used, report.bad.count) == (4, 1, 3)
    assert "rows that cannot be used, left out: 3 (rows.jsonl line 9: not valid JSON, rows.jsonl line 2: " in str(
        report
    )


def test_of_a_long_row_only_a_beginning_is_tokenised(tokenizer):
    words = "".join(f"word{i} " for i in range(200_000))
    spaces = " " * 10_000 + words
    assert len(words) > 2_000_000
    merged = byte_tokenizer(merges=[("Ġ" * 2**i, "Ġ" * 2**i) for i in range(6)])
    for row in ({"input": words, "output": spaces}, chat("a", words)):
        start = time.perf_counter()
        example, report = one(row, merged, source_max_len=50, target_max_len=70)
        assert time.perf_counter() - start < 5
        assert len(example) == 120
        truncated = report.source_truncated, report.target_truncated, report.conversation_truncated
        assert [tally.count for tally in truncated] in ([1, 1, 0], [0, 0, 1])
    example, _ = one({"input": words, "output": spaces}, merged, source_max_len=50, target_max_len=70)
    beginning = [*ids(merged, words[:2_000])[:49], *ids(merged, spaces[:12_000])[:70]]
    assert example.input_ids[1:].tolist() == beginning


def test_template_without_end_of_turn_is_reported():
    plain = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    plain += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = byte_tokenizer(template=plain)
    example, report = one(chat("a", "b"), tokenizer)
    assert trained_text(example, tokenizer) == ["b\n"]
    assert "stopping is not learnt: 1 (rows.jsonl line 1)" in str(report)


def test_message_keys_beyond_role_and_content_are_reported(tokenizer):
    row = chat("a", "b")
    row["messages"][1]["weight"] = 0
    _, report = one(row, tokenizer)
    assert "message keys left to the chat template, which may ignore them: weight" in str(report)


def test_prompts_are_encoded_as_in_training(tokenizer):
    rows = {
        "messages": chat("Name a fish.", "Cod"),
        "alpaca": {"instruction": "Name a fish.", "output": "Cod"},
        "alpaca-clean": {"instruction": "Name a fish.", "output": "Cod"},
        "input-output": {"input": "Name a fish.", "output": "Cod"},
        "prompt-completion": {"prompt": "Name a fish.", "completion": "Cod"},
        "question-answer": {"question": "Name a fish.", "answer": "Cod"},
        "sharegpt": {
            "conversations": [{"from": "human", "value": "Name a fish."}, {"from": "gpt", "value": "Cod"}],
        },
        "oasst1": {"text": "### Human: Name a fish.### Assistant: Cod"},
    }
    assert rows.keys() == FORMATS.keys()
    for name, row in rows.items():
        prompt = encode_prompt("Name a fish.", tokenizer=tokenizer, dataset_format=name)
        example, _ = one(row, tokenizer, dataset_format=name)
        assert prompt.dtype == np.int32
        assert prompt.tolist() == example.input_ids[: len(prompt)].tolist(), name
        if name != "oasst1":
            assert np.flatnonzero(example.labels != IGNORED)[0] == len(prompt)


def test_embedded_set_through_the_whole_way(tokenizer):
    examples, report = tokenize_rows(load_rows("default"), tokenizer=tokenizer)
    assert report.rows_used == report.rows_read == len(examples) >= 300
    assert all(e.input_ids[e.labels != IGNORED][-1] == IM_END for e in examples)


def test_tokens_that_the_model_has_no_row_for_are_refused(tokenizer):
    check_tokens([0, 7], tokenizer, 8, "here")
    check_tokens([], tokenizer, 8, "here")
    with pytest.raises(UserError, match=r"^here: token 8 \(.*\) is beyond the model's vocab_size 8; "):
        check_tokens([0, 8], tokenizer, 8, "here")
    with pytest.raises(UserError, match=r"^here: token -1 is negative; use the tokenizer of the model\.$"):
        check_tokens([5, -1], tokenizer, 8, "here")
