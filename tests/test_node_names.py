"""Names of runs are one folder on every system, and no other place."""

import pytest

from comfy_tdpo.nodes.runs.names import check_run_name, later_name, problem_with


@pytest.mark.parametrize("name", ["a", "my run", "Run-2_b+c.v1", "été 3", "花", "x" * 80, "con2", "com"])
def test_good_names(name):
    assert check_run_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", " ", "../../x", "/etc", "C:\\x", "C:", "a/b", "a\\b", ".", "..", ".hidden", "-rf", "x.", "x ", "a\nb", "a\0b"]
    + ["x" * 81, "é" * 41, "x" * 1000, "CON", "nul", "com1.txt", "lpt9", "a:b", "a*", "~", "$HOME", "a\u202eb"],
)
def test_bad_names(name):
    with pytest.raises(ValueError, match="got run name .*expected a name") as error:
        check_run_name(name)
    assert len(str(error.value)) < 350 and "\n" not in str(error.value)


def test_later_names():
    assert [later_name("a", n) for n in (1, 2, 3)] == ["a", "a-2", "a-3"]
    assert problem_with(later_name("x" * 80, 2)), "a name that is too long to go on with says so itself"
