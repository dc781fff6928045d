"""Faults that tests/demo must catch; see `sabotage`."""

import pytest

from sabotage import fault, wrap


@fault(caught_by="tests/demo/test_page.py::test_no_name_of_a_model_becomes_markup")
def page_without_escaping(patch: pytest.MonkeyPatch) -> None:
    import jinja2

    class Careless(jinja2.Environment):
        def __init__(self, **settings: object) -> None:
            super().__init__(**{**settings, "autoescape": False})  # type: ignore[arg-type]

    patch.setattr(jinja2, "Environment", Careless)


@fault(caught_by="tests/demo/test_page.py::test_a_spike_between_many_points_is_drawn")
def chart_thinned_by_every_nth_point(patch: pytest.MonkeyPatch) -> None:
    import numpy as np

    from normkit.report import drawing

    patch.setattr(
        drawing,
        "_thin",
        lambda most, x, *values: np.arange(0, len(x), max(len(x) // most, 1)),
    )


@fault(
    caught_by="tests/demo/test_demo.py::test_a_check_that_did_not_hold_shows_and_fails_the_run"
)
def demo_held_by_its_first_step_alone(patch: pytest.MonkeyPatch) -> None:
    from normkit.demo import DemoResult

    patch.setattr(
        DemoResult,
        "held",
        property(lambda self: all(c.held for c in self.train.checks)),
    )


@fault(caught_by="tests/demo/test_demo.py::test_the_command_fails_where_a_step_does")
def demo_command_that_always_succeeds(patch: pytest.MonkeyPatch) -> None:

    def polite(app, **call: object) -> int:
        code = app(**call)  # type: ignore[arg-type]
        return 0 if code == 1 else code

    wrap(patch, "normkit_cli.app", polite)
