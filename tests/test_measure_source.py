"""`tools/measure_source.py` on a package of seven files, counted by hand."""

import runpy
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "tools" / "measure_source.py"
FILES = {
    "__init__.py": '"""What this is."""\n',
    "cli/plan.py": "from fedvlm_jax.plan.own import work  # a comment\n\nfrom fedvlm_jax.utils import shared\n",
    "cli/_parser.py": "import fedvlm_jax.plan.own\n",
    "cli/train.py": '"""Train."""\nfrom fedvlm_jax.utils import shared\n',
    "plan/own.py": "# two\ndef work():\n    '''Work.\n\n    >>> work()\n    '''\n    import fedvlm_jax.plan.deeper\n",
    "plan/deeper.py": "text = '# none'\n",
    "utils/shared.py": "x = 1\n" * 4,
}


def test_a_package_is_counted(tmp_path):
    for name, text in FILES.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    found = runpy.run_path(str(SCRIPT))["measure"](tmp_path)
    assert list(found.values()) == [
        "19",
        "10.5%",  # of lines, 2
        "33.3%",  # of docstrings, 1 of 3
        "33.3%",
        "42.1% (plan)",
        "3 (cli)",
        "11",  # plan.py, own.py, deeper.py
    ]
