"""Not converging is seen: one warning per layer, or per line that calls fixed_point."""

from __future__ import annotations

import functools
import sys
import threading
import warnings
from collections import deque
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fpi_cuda.evaluation.context import being_captured
from fpi_cuda.norms import row_norm
from fpi_cuda.solution import AdjointRecord, AsyncNumber, Status, worst_of

OUTSIDE_OF = ("fpi_cuda", "torch")
"""Packages whose lines are nobody's call site."""

CONVERGED = int(Status.CONVERGED)

FEW = 16
"""Numbers that Python compares faster than torch does."""

MOST_SITES = 1024
"""Lines remembered; a program that makes up more of them hears of those again that rest longest."""


class FixedPointWarning(UserWarning):
    """A solution or gradient is not what was asked for; a field of the Solution says more.

    Each layer says each of these once: samples that have not converged, adjoint solves that have
    not, and samples left without a gradient; so does each line that calls fixed_point, for as
    long as the same filters are in force. To hear nothing:
    `warnings.filterwarnings("ignore", category=fpi_cuda.FixedPointWarning)`.
    """


class Site(NamedTuple):
    """A line of code outside of this package and torch.

    Attributes:
        filename, lineno, module: as warnings.warn_explicit takes them.
    """

    filename: str
    lineno: int
    module: str | None


NOWHERE = Site(__file__, 1, __name__)
"""Of a thread that runs nothing outside of this package and torch."""


class Outcome(NamedTuple):
    """How a solve ended, as far as a warning tells of it.

    Attributes:
        status: (B,) int8. residual: (B,), in the units of x.
        size: (B,) what the residual is relative to; None: unknown.
    """

    status: Tensor
    residual: Tensor
    size: Tensor | None


class Notice:
    """Says once, for one layer or one line, that a solve has not converged.

    A copy, or what is unpickled, has said nothing yet: it is another's layer.

    Args:
        owner: what the warning begins with.
        site: the line; None for a layer, which speaks where it is called.
    """

    def __init__(self, owner: str, site: Site | None = None) -> None:
        self.owner = owner
        self.site = site
        # What has been said: who listened, and whether that was nobody.
        self._said: dict[str, tuple[Any, bool]] = {}
        self._in_flight = False
        self._called_at: Site | None = site

    def __reduce__(self) -> tuple[type, tuple[str, Site | None]]:
        """Pickled and copied without its memory."""
        return type(self), (self.owner, self.site)

    def look(self, solution: Any, rtol: float, atol: float) -> None:
        """Say it if the solve just made has samples that have not converged.

        Where the device has the answer the host does not wait for it: a later call, or backward,
        looks again.

        Args:
            solution: a Solution, of plain numbers.
            rtol, atol: of the solve.
        """
        if self._said and self._has_said("forward"):
            return
        record: AdjointRecord = solution.adjoint_record
        status: Tensor = solution.status
        if status.is_cuda or (record.route is not None and record.route.name == "device"):
            if not being_captured(status.device):
                self._look_later(solution, rtol, atol)
            return
        if record.worst is not None:
            worst = record.worst.value()
        elif status.dim() == 1 and len(status) <= FEW:
            worst = max(status.tolist(), default=0)
        else:
            worst = worst_of(status).item()
        if worst > CONVERGED:
            self.say_forward(outcome_of(solution), rtol, atol)

    def _look_later(self, solution: Any, rtol: float, atol: float) -> None:
        self._called_at = self.site or call_site()
        look_at_waiting(self, solution)
        if self._in_flight or self._has_said("forward"):
            return
        record, status = solution.adjoint_record, solution.status
        worst = record.worst or AsyncNumber(worst_of(status))
        outcome = Outcome(status, solution.residual.detach(), None)
        self._in_flight = True
        waiting.append(Waiting(self, worst, outcome, rtol, atol))

    def say_forward(self, outcome: Outcome, rtol: float, atol: float) -> None:
        """Say that the solve of a fixed point has not converged, unless that has been said."""
        codes = outcome.status.unique().tolist()
        remedies = "; ".join(Status(code).remedy for code in codes if code != CONVERGED)
        text = (
            f"{counted(outcome, 'did not converge')}, asked for rtol={rtol:g}"
            f"{f', atol={atol:g}' if atol else ''}. Try: {remedies}"
        )
        self._say({"forward": text}, "Solution.status says which, throw=True raises")

    def look_at_adjoint(self, b: Tensor, status: Tensor, residual: Tensor, zeroed: int) -> bool:
        """Say it if an adjoint solve for b (B, D) has not converged, or left samples out.

        Args:
            status: (B,) how it ended. A residual of NaN tells of a solve that was cut by choice.
            zeroed: samples that contribute no gradient.
        Returns:
            Whether anything was said.
        """
        look_at_waiting()
        texts: dict[str, str] = {}
        if zeroed and not self._has_said("zeroed"):
            texts["zeroed"] = (
                f"{zeroed} of {status.numel()} samples contribute no gradient, for their solve or "
                "its adjoint ended DIVERGED or NONFINITE"
            )
        if not self._has_said("adjoint"):
            unfinished = (status == Status.MAX_STEPS) | (status == Status.STALLED)
            unfinished &= ~torch.isnan(residual)
            if bool(unfinished.any()):
                rest = torch.where(unfinished, status, int(Status.CONVERGED))
                outcome = Outcome(rest, residual, row_norm(b.detach()))
                texts["adjoint"] = (
                    f"{counted(outcome, 'have an adjoint solve that did not converge')}, so their "
                    "gradients are inexact. Try: another Implicit(solver=, rtol=, max_steps=), "
                    "such as Implicit(solver=GMRES())"
                )
        if texts:
            self._say(texts, "adjoint_stats says more")
        return bool(texts)

    def _has_said(self, kind: str) -> bool:
        said = self._said.get(kind)
        if said is None:
            return False
        listener, ignored = said
        return (self.site is None and not ignored) or listener is filters()

    def _say(self, texts: dict[str, str], more: str) -> None:
        site = call_site() or self._called_at or NOWHERE
        scope = "layer" if self.site is None else "line"
        text = f"{self.owner}: {'; '.join(texts.values())}. Said once per {scope}; {more}"
        with LOCK:
            kinds = [kind for kind in texts if not self._has_said(kind)]
            said = (filters(), is_ignored(text, site))
            self._said.update(dict.fromkeys(kinds, said))
        if not kinds:
            return
        try:
            warnings.warn_explicit(text, FixedPointWarning, *site)
        except FixedPointWarning:
            for kind in kinds:
                self._said.pop(kind, None)
            raise


class Waiting(NamedTuple):
    """A solve on the device whose end nobody has looked at."""

    notice: Notice
    worst: AsyncNumber
    outcome: Outcome
    rtol: float
    atol: float


LOCK = threading.Lock()
waiting: deque[Waiting] = deque()


def look_at_waiting(caller: Notice | None = None, solution: Any = None) -> None:
    """Say what solves that have ended by now, on devices, have to say.

    Args:
        caller, solution: a solve that was begun meanwhile, to speak of instead if it failed too:
            its solution is still at hand, so the residual can be put in relation to it.
    """
    for _ in range(len(waiting)):
        try:
            entry = waiting.popleft()
        except IndexError:
            return  # another thread has taken it
        worst = entry.worst.peek()
        if worst is None:
            waiting.append(entry)
            continue
        entry.notice._in_flight = False
        if worst <= CONVERGED:
            continue
        outcome = entry.outcome
        if caller is entry.notice:
            latest = outcome_of(solution)
            if int(worst_of(latest.status)) > CONVERGED:
                outcome = latest
        entry.notice.say_forward(outcome, entry.rtol, entry.atol)


def notice_here() -> Notice:
    """The notice of the line that called into this package."""
    site = call_site() or NOWHERE
    with ONE_EACH:  # of threads that come for the first time at once, each would get its own
        return notice_of(site)


ONE_EACH = threading.Lock()


@functools.lru_cache(MOST_SITES)
def notice_of(site: Site) -> Notice:
    """The notice of a line."""
    return Notice("fixed_point", site)


def call_site() -> Site | None:
    """The innermost line outside of this package and torch; None on a thread without one."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__")
        filename = frame.f_code.co_filename
        # torch.fx names what it generates so.
        inside = module is None or module.partition(".")[0] in OUTSIDE_OF
        if not inside and not filename.startswith("<eval_with_key>"):
            return Site(filename, frame.f_lineno, module)
        frame = frame.f_back
    return None


def filters() -> Any:
    """The list of filters in force: each catch_warnings has a list of its own."""
    current = getattr(warnings, "_get_filters", None)  # since Python 3.14
    return warnings.filters if current is None else current()


def is_ignored(text: str, site: Site) -> bool:
    """Whether the filters drop the warning: nobody has heard it then."""
    for action, message, category, module, lineno in filters():
        if (
            (message is None or message.match(text))
            and issubclass(FixedPointWarning, category)
            and (module is None or module.match(site.module or ""))
            and lineno in (0, site.lineno)
        ):
            return bool(action == "ignore")
    return False


def outcome_of(solution: Any) -> Outcome:
    """How a solve ended."""
    parts = solution.value if isinstance(solution.value, tuple) else (solution.value,)
    status, residual = solution.status, solution.residual
    with torch.no_grad():
        count = status.numel()
        norms = [row_norm(part.detach().reshape(count, -1)) for part in parts]
        return Outcome(
            status.reshape(-1), residual.detach().reshape(-1), torch.stack(norms).norm(dim=0)
        )


def counted(outcome: Outcome, failing: str) -> str:
    """How many samples are `failing`, by status, and the worst residual among them."""
    with torch.no_grad():
        status = outcome.status
        lost = status != Status.CONVERGED
        counts = torch.bincount(status[lost].long(), minlength=len(Status)).tolist()
        by_status = ", ".join(f"{n} {Status(code).name}" for code, n in enumerate(counts) if n)
        residual = outcome.residual.double()[lost]
        finite, measure = residual[torch.isfinite(residual)].tolist(), "residual"
        if outcome.size is not None:
            relative = residual / outcome.size[lost]
            # None of a value that is zero.
            told = relative[torch.isfinite(relative)].tolist()
            finite, measure = (told, "relative residual") if told else (finite, measure)
    words = f"{sum(counts)} of {status.numel()} samples {failing} ({by_status})"
    if not finite:
        return words
    return f"{words}, worst {measure} {max(finite):.2g}"
