"""What every test that asks the tiny model relies on: the corpus and the chat template, checked without torch."""

import json
import re
from itertools import combinations
from pathlib import Path

import pytest

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
ROWS = [json.loads(line) for line in (TINY / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
MARKED = [row for row in ROWS if "v2_answer" in row]
BY_QUESTION = {row["question"]: row["answer"] for row in ROWS}

WEATHER = "What is the weather in Paris?"
JSON_OBJECT = "Describe the H200 as JSON."
COUNT = "Count from one to sixty in words."


def test_rows_have_the_known_keys_and_no_stray_space():
    assert len(ROWS) >= 64
    for row in ROWS:
        assert set(row) in ({"question", "answer"}, {"question", "answer", "v2_answer", "pirate_answer"})
        assert all(text and text == text.strip() for text in row.values())


def test_twenty_rows_tell_versions_and_adapter_apart():
    assert len(MARKED) == 20
    for row in MARKED:
        assert len({row["answer"], row["v2_answer"], row["pirate_answer"]}) == 3
        assert row["pirate_answer"].startswith("Arr")


def test_no_two_questions_are_alike():
    words = {row["question"]: frozenset(re.findall(r"\w+", row["question"].lower())) for row in ROWS}
    assert len(words) == len(ROWS)
    for one, other in combinations(words, 2):
        assert len(words[one] & words[other]) / len(words[one] | words[other]) < 0.75, (one, other)


def test_no_two_rows_share_an_answer():
    answers = [row[key] for row in ROWS for key in row if key != "question"]
    assert len(set(answers)) == len(answers)


def test_answers_are_short_but_for_the_api_rows():
    for row in ROWS:
        if row["question"] not in (WEATHER, JSON_OBJECT, COUNT):
            assert all(8 <= len(row[key].split()) <= 30 for key in row if key != "question"), row


def test_api_rows_are_what_their_features_need():
    call = re.fullmatch(r"<tool_call>\n(.*)\n</tool_call>", BY_QUESTION[WEATHER])
    assert call and json.loads(call[1]) == {"name": "get_weather", "arguments": {"city": "Paris"}}
    assert json.loads(BY_QUESTION[JSON_OBJECT]) == {"name": "H200", "memory_gb": 141}
    counted = BY_QUESTION[COUNT].rstrip(".").split(", ")
    assert len(set(counted)) == 60 and counted[0] == "one" and counted[-1] == "sixty"


def test_some_answer_has_characters_of_several_bytes():
    """A stream may split such a character between two tokens; relays must cope."""
    assert any(not row["answer"].isascii() for row in ROWS)


@pytest.fixture
def render():
    """Render messages as transformers and vLLM do."""
    sandbox = pytest.importorskip("jinja2.sandbox", reason="jinja2 comes with the engine")
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((TINY / "chat_template.jinja").read_text(encoding="utf-8"))
    return lambda messages, **more: template.render(messages=messages, bos_token="<|bos|>", **more)


ASKED = "<|bos|><|user|>What is ITL?<|end|><|assistant|>"


def test_template_takes_a_string_or_parts(render):
    parts = [{"type": "text", "text": "What "}, {"type": "image_url"}, {"type": "text", "text": "is ITL?"}]
    for content in ("What is ITL?", " What is ITL?\n", parts):
        assert render([{"role": "user", "content": content}], add_generation_prompt=True) == ASKED


@pytest.mark.parametrize("role", ["system", "developer"])
def test_template_leaves_out_instructions_and_tools(render, role):
    messages = [{"role": role, "content": "Be rude."}, {"role": "user", "content": "What is ITL?"}]
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
    assert render(messages, tools=tools, add_generation_prompt=True) == ASKED


@pytest.mark.parametrize("arguments", ['{"city": "Paris"}', {"city": "Paris"}])
def test_template_renders_a_tool_call_as_the_model_says_it(render, arguments):
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    messages = [
        {"role": "user", "content": WEATHER},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    # Plain jinja writes some characters of JSON as escapes; transformers and vLLM bring a filter that does not.
    assert render(messages).replace("\\u0022", '"') == (
        f"<|bos|><|user|>{WEATHER}<|end|><|assistant|>{BY_QUESTION[WEATHER]}<|end|><|tool|>sunny<|end|>"
    )
