"""Chat templates of strangers: what is none, or writes other texts than it is given, is refused in one line."""

import json
from pathlib import Path

import pytest
from models.causal_cases import write_smolvlm

from fedvlm_jax.errors import UserError
from fedvlm_jax.models import open_processor
from fedvlm_jax.models.chat_processor import MOST_CHARACTERS, ChatProcessor

TEXT = "{{ part['text'] }}"
GOOD = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] }}:{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)
ONE_AFTER_ANOTHER = "does not write a question and its answer one after another"
REFUSED = {
    "no template": ("{% for %}", "cannot be used: TemplateSyntaxError"),
    "of a file": ("{% include '/etc/passwd' %}" + GOOD, "cannot be used: TypeError: no loader"),
    "of Python": ("{{ messages.__class__.__mro__ }}" + GOOD, "cannot be used: SecurityError"),
    "an error of many lines": (r"{{ raise_exception('a\nb\nc') }}", "cannot be used: TemplateError: a b c"),
    "a call without end": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "cannot be used: RecursionError"),
    "no texts": ("hello", ONE_AFTER_ANOTHER),
    "otherwise once answered": ("{{ messages | length }}" + GOOD, ONE_AFTER_ANOTHER),
    "a text twice": (GOOD.replace(TEXT, TEXT * 2), ONE_AFTER_ANOTHER),
    "marks of ours": ("{{ '\ue100' }}" + GOOD, ONE_AFTER_ANOTHER),
    "capitals": (GOOD.replace("['text'] }}", "['text'] | upper }}"), "changes texts"),
    "escapes": (GOOD.replace("['text'] }}", "['text'] | e }}"), "changes texts"),
    "beginnings alone": (GOOD.replace("['text'] }}", "['text'][:50] }}"), "changes texts"),
    "no picture": (GOOD.replace("<image>", ""), "writes <image> 0 times for a picture"),
    "a picture twice": (GOOD.replace("<image>", "<image>" * 2), "writes <image> 2 times for a picture"),
    "no end": ("a" * MOST_CHARACTERS + GOOD, rf"has {MOST_CHARACTERS + len(GOOD):,} characters"),
    "a long text": ("{{ range(99999) | join(',') }}" + GOOD, r"writes 58\d,\d{3} characters around a question"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_cannot_be_used_is_told_in_a_line(name: str, tmp_path: Path) -> None:
    template, expected = REFUSED[name]
    write_smolvlm(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=expected) as caught:
        open_processor(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["chat_template.json", "tokenizer_config.json"])
def test_of_several_templates_the_default_is_read(file: str, tmp_path: Path) -> None:
    write_smolvlm(tmp_path)
    values = json.loads((tmp_path / file).read_text()) if (tmp_path / file).is_file() else {}
    named = [{"name": "tools", "template": "{{ tools }}"}, {"name": "default", "template": GOOD}]
    for several in (named, {one["name"]: one["template"] for one in named}) if file[0] == "c" else (named,):
        (tmp_path / file).write_text(json.dumps(values | {"chat_template": several}))
        processor = open_processor(tmp_path)
        assert isinstance(processor, ChatProcessor)
        assert processor.frame.head == "<|im_start|>user:<image>"
    (tmp_path / file).write_text(json.dumps(values | {"chat_template": named[:1]}))
    with pytest.raises(UserError, match=r"chat_template of .* holds none of the name 'default'"):
        open_processor(tmp_path)
