import pytest
from evaluation.make_golden import split_words
from hypothesis import given
from hypothesis import strategies as st

from fedvlm_jax.evaluation.metrics.answer_tokens import normalise, pair_up, tokenise, tokenise_squad


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("  Animals &  Nature. ", "animals & nature"),
        ("Straße", "strasse"),
        ("ＡＢＣ１２", "abc12"),
        ("「動物と自然」。", "動物と自然"),
        ("コーヒー", "コーヒー"),
        ("食べ物・飲み物", "食べ物・飲み物"),
        ("动物、自然！", "动物、自然"),
        ("«Еда и напитки»", "еда и напитки"),
        ("и\u0306", "й"),
        ("¿Qué es?", "qué es"),
        ("e\u0301", "é"),
        ("\ufeffface-smiling\u200b", "face-smiling"),
        ("\u3000顔\u00a0", "顔"),
        ("?", "?"),
        ("$5", "$5"),
        ("it's", "it's"),
        ("", ""),
        (" \n", ""),
    ],
)
def test_normal_forms(text, form):
    assert normalise(text) == form


@given(st.text())
def test_normalising_twice_changes_nothing(text):
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("It's well-known: 3.5 km", ["it", "s", "well", "known", "3", "5", "km"]),
        ("食べ物・飲み物", ["食", "べ", "物", "飲", "み", "物"]),
        ("コーヒー！", ["コ", "ー", "ヒ", "ー"]),
        ("ｺｰﾋｰﾊﾞｰ", ["コ", "ー", "ヒ", "ー", "バ", "ー"]),
        ("人々はiPhoneを2台", ["人", "々", "は", "iphone", "を", "2", "台"]),
        ("红色的，公共汽车", ["红", "色", "的", "公", "共", "汽", "车"]),
        ("한국어 단어", ["한국어", "단어"]),
        ("हिन्दी भाषा।", ["हिन्दी", "भाषा"]),
        ("สวัสดีครับ", ["ส", "วั", "ส", "ดี", "ค", "รั", "บ"]),
        ("Еда и напитки", ["еда", "и", "напитки"]),
        ("\u0645\u0631\u062d\u0628\u064b\u0627 بك", ["\u0645\u0631\u062d\u0628\u064b\u0627", "بك"]),
        ("cafe\u0301 CAFÉ", ["café", "café"]),
        ("?!", ["?!"]),
        ("🍎", ["🍎"]),
        ("", []),
        (" \n", []),
    ],
)
def test_tokens(text, tokens):
    assert tokenise(text) == tokens


@given(st.text(alphabet=[chr(code) for code in range(128)]))
def test_on_ascii_tokens_are_those_of_rouge(text):
    assert tokenise(text) == split_words(text) or not split_words(text)


@given(st.text())
def test_tokens_do_not_depend_on_the_form_and_are_only_missing_where_text_is(text):
    assert tokenise(text) == tokenise(normalise(text))
    assert bool(tokenise(text)) == bool(normalise(text)) == bool(tokenise_squad(text))


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("It's the 1,000th of a well-known kind.", ["its", "1000th", "of", "wellknown", "kind"]),
        ("$5 = 5_000", ["5", "5000"]),
        ("The", ["the"]),
        ("A", ["a"]),
        ("un chien, le chat", ["un", "chien", "le", "chat"]),
        ("动物、自然！", ["动", "物", "自", "然"]),
        ("?", ["?"]),
        ("", []),
    ],
)
def test_tokens_of_squad(text, tokens):
    assert tokenise_squad(text) == tokens


def test_answers_are_paired_or_refused():
    assert pair_up(["a"], [["b", "c"]]) == [("a", ["b", "c"])]
    with pytest.raises(ValueError, match="1 predictions for 2 lists"):
        pair_up(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match=r"are \[\]; expected a list of one text or more"):
        pair_up(["a"], [[]])
    with pytest.raises(ValueError, match="are 'yes'; expected a list"):
        pair_up(["y"], ["yes"])
