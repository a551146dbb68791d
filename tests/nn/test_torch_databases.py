"""What torch's own databases of operators, modules and optimizers find wrong with braze and not with torch."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from typing import Any

import pytest

pytest.importorskip("expecttest")  # which torch's databases import
import differences
import torch
import torch_databases as databases
import wrong_substitutes as wrong
from torch_databases import Case, Outcome

pytestmark = pytest.mark.cpu_only("the control is what torch computes on the CPU")

ALL = [(database, subject) for database, of in databases.SUBJECTS.items() for subject in of]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def listed(found: list[Outcome]) -> str:
    return "\n".join(f"{o.id}: {o.braze}" for o in found)


@pytest.mark.parametrize(("database", "subject"), ALL, ids=[subject for _, subject in ALL])
def test_no_difference_but_the_accepted_ones(database: str, subject: str) -> None:
    found = [
        o
        for o in databases.outcomes(database, subject)
        if o.differs and databases.row_of(o.id) is None
    ]
    assert not found, f"torch passes, braze does not:\n{listed(found)}"


def test_every_accepted_difference_is_still_one() -> None:
    stale = databases.stale_rows(databases.everything())
    assert not stale, f"accepted in differences.py, but no longer different: delete {stale}"


def test_every_subject_of_the_databases_is_checked() -> None:
    for database, subjects in databases.SUBJECTS.items():
        assert set(subjects) == set(databases.cases(database))


def test_torch_passes_every_check_somewhere() -> None:
    """A check that the control never passes would find nothing."""
    passes: Counter[str] = Counter()
    for database, of in databases.SUBJECTS.items():
        for subject in of:
            for o in databases.outcomes(database, subject):
                passes[f"{database}/{o.id.split('/')[1]}"] += o.torch is None
    assert not [check for check, count in passes.items() if count == 0]


def by_check(database: str) -> dict[str, list[Case]]:
    found: dict[str, list[Case]] = defaultdict(list)
    for cases in databases.cases(database).values():
        for case in cases:
            found[case.check].append(case)
    return found


def substitutes(database: str, cases: list[Case]) -> Any:
    """(what is wrong, the same case with that in braze's place)."""
    if database == "database_ops":
        for name, change in wrong.FUNCTIONS.items():
            for case in cases:
                yield name, dataclasses.replace(case, braze=change(case.torch))
        return
    changes = wrong.MODULES if database == "database_modules" else wrong.OPTIMIZERS
    subjects = [s for s in databases.SUBJECTS[database] if not s.startswith("Transformer")]
    for name, change in changes.items():
        namespace = wrong.Namespace(cases[0].torch, change, subjects)
        for case in cases:
            yield name, dataclasses.replace(case, braze=namespace)


@pytest.mark.parametrize("database", databases.SUBJECTS)
def test_every_check_finds_a_wrong_substitute(database: str) -> None:
    """Torch's own function, class or optimizer with one thing wrong with it, in braze's place."""
    blind = []
    for check, cases in by_check(database).items():
        some = cases[:: len(cases) // 7 | 1]  # a few of all kinds are enough
        if not any(databases.outcome(case).differs for _, case in substitutes(database, some)):
            blind.append(check)
    assert not blind, f"checks that nothing fails: {blind}"


@pytest.mark.parametrize(
    ("database", "kind"),
    [
        *(("database_ops", kind) for kind in wrong.FUNCTIONS),
        *(("database_modules", kind) for kind in wrong.MODULES),
        *(("database_optimizers", kind) for kind in wrong.OPTIMIZERS),
    ],
)
def test_every_wrong_substitute_is_found(database: str, kind: str) -> None:
    subject = databases.SUBJECTS[database][1]
    cases = [c for c in databases.cases(database)[subject] if "compiled" not in c.check]
    found = (c for name, c in substitutes(database, cases) if name == kind)
    assert any(databases.outcome(case).differs for case in found)


def test_the_page_is_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["differences.py", "--check"])
    assert differences.main() == 0, "docs/differences.md: run python tests/support/differences.py"


def test_counts(record_property: Any) -> None:
    """For the summary of the run."""
    found = list(databases.everything())
    differing = [o for o in found if o.differs]
    rows = Counter(databases.row_of(o.id) for o in differing)
    record_property(
        "summary",
        [
            f"torch's databases: {len(found)} checks, torch passes "
            f"{sum(o.torch is None for o in found)}, braze {sum(o.braze is None for o in found)}, "
            f"only braze fails {len(differing)}, of these accepted {len(differing) - rows[None]}:",
            *(f"  {rows[row]:4} {row.area}: {row.title}" for row in differences.DIFFERENCES),
        ],
    )
    assert len(found) > 5000
