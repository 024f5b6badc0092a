"""The list of `tests/mutations.py` fits the code as it is; the mutations themselves are run by that command."""

import ast
from collections import Counter
from pathlib import Path

import pytest

from tests.mutations import MUTATIONS, ROOT, Mutation, mutated


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_changes_one_place_of_a_file_and_leaves_it_python(mutation: Mutation) -> None:
    text = mutated(mutation, ROOT / "raydistill")
    assert text is not None, f"{mutation.old!r} must occur exactly once in {mutation.file}"
    before = (ROOT / "raydistill" / mutation.file).read_text()
    assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(before))
    assert (ROOT / mutation.tests[0]).is_file()


def test_names_are_unique_and_a_text_that_is_not_there_once_is_noticed(tmp_path: Path) -> None:
    assert [name for name, count in Counter(m.name for m in MUTATIONS).items() if count > 1] == []
    (tmp_path / "a.py").write_text("x = y.detach() + z.detach()\n")
    for old in (".detach()", "nowhere"):
        assert mutated(Mutation("a", "a.py", old, "", ()), tmp_path) is None
    assert mutated(Mutation("a", "a.py", "y.detach()", "y", ()), tmp_path) == "x = y + z.detach()\n"
