"""The chain of stages: each has a key (everything its outcome depends on), which decides whether it is skipped,
resumed, run or refused."""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_train import interrupts, names
from ldm_train.configuration import differences
from ldm_train.errors import Busy, Refused
from ldm_train.storage import check_links, held, link_or_copy, open_lock, read_record, write_json

NOTE = "stage.json"


@dataclass(frozen=True)
class Step:
    """A stage (see `stage.Stage`) bound to one run.

    key: () -> everything its outcome depends on. run: (folder) -> its result. steps: optimiser steps to reach (0: no
    training)
    """

    name: str
    key: Callable[[], dict[str, Any]]
    run: Callable[[Path], dict[str, Any]]
    steps: int = 0


class Order:
    """All stages in order, each after those it needs: {name: (needs, identity)}."""

    def __init__(self, stages: Mapping[str, tuple[Sequence[str], str]]):
        self.stages = dict(stages)

    def chosen(self, names: Sequence[str]) -> list[str]:
        """Returns the names of the given stages in the order of all stages. Raises ValueError for an unknown name."""
        if unknown := [s for s in names if s not in self.stages]:
            raise ValueError(f"unknown stages {unknown}; choose from {', '.join(self.stages)}")
        return [s for s in self.stages if s in names]

    def needs(self, name: str) -> Sequence[str]:
        return self.stages[name][0]

    def later_than(self, stage: str) -> list[str]:
        """The stages that depend on this stage, directly or not, in order."""
        affected = [stage]
        for name in self.stages:
            if set(self.needs(name)) & set(affected):
                affected.append(name)
        return affected[1:]

    def leading_to(self, stage: str) -> list[str]:
        """This stage and all stages it needs, directly or not, in order."""
        needed = {stage}
        for name in reversed(self.stages):
            if name in needed:
                needed |= set(self.needs(name))
        return [name for name in self.stages if name in needed]

    def result_of(self, run_folder: Path, stage: str, name: str | None = None) -> Any:
        """Returns the entry `name` (by default the identity) of a finished stage's result. Raises Refused, with the
        remedy, if the stage is not finished or its stage.json is damaged."""
        note, name = read_note(run_folder / stage), name or self.stages[stage][1]
        if note is None or not note["finished"]:
            way = ",".join(self.leading_to(stage))
            raise Refused(f"{run_folder} has no finished stage {stage!r} yet; run it first: stages=[{way}]")
        if name not in note["result"]:
            raise Refused(
                f"{run_folder / stage / NOTE} is damaged: it lacks {name}; restart={stage} runs the stage again"
            )
        return note["result"][name]


NOTED = {"key": dict, "finished": bool, "steps": int, "result": dict}


def read_note(folder: Path) -> dict[str, Any] | None:
    """Reads stage.json from a stage's folder; None if there is none. Raises Refused if it is damaged."""
    path = folder / NOTE
    if not path.is_file():
        return None
    try:
        note = read_record(path)
        if odd := [k for k, kind in NOTED.items() if not isinstance(note.get(k), kind)]:
            raise ValueError(f"{path} lacks {', '.join(odd)}")
    except ValueError as error:
        raise Refused(
            f"{error}; what the stage was made with is not known: restart={folder.name} runs it again (the old one goes to "
            f"{folder.parent}/.replaced), or put back an undamaged {NOTE}"
        ) from error
    return note | {"key": names.options(note["key"])}


def is_done(note: dict[str, Any], stage: Step) -> bool:
    """Returns True if a stage is finished with at least as many steps as requested."""
    return bool(note["finished"] and note["steps"] >= stage.steps)


def made_anew(order: Order, chain: Sequence[Step], run_folder: Path, restart: str | None) -> list[str]:
    """The stages that `restart` sets aside, in order: the stage itself, the stages that depend on it, and those that
    depend on a stage that is trained further and would no longer match it."""
    if restart is None:
        return []
    gone = {restart, *order.later_than(restart)}
    for step in chain:
        note = None if step.name in gone else read_note(run_folder / step.name)
        if note is not None and not is_done(note, step):
            gone |= {*order.later_than(step.name)}
    return [name for name in order.stages if name in gone]


def set_aside(run_folder: Path, names: Sequence[str]) -> None:
    """Moves the folders of stages to .replaced/, from where they can be restored."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for name in names:
        if (run_folder / name).exists():
            target = run_folder / ".replaced" / f"{name}-{stamp}"
            while target.exists():  # another restart within the same second
                target = target.with_name(f"{target.name}+")
            target.parent.mkdir(exist_ok=True)
            shutil.move(run_folder / name, target)


@contextmanager
def run_lock(run_folder: Path, patience: float = 0.0) -> Iterator[None]:
    """A context that locks a run folder for this process. Raises Refused if another process works in it for longer than
    `patience` seconds, and ValueError if a link in it leads out of it: a run writes only below its own folder, even if
    that folder comes from a stranger."""
    run_folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + patience
    with open_lock(run_folder / ".lock") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() >= end:
                    raise Busy(
                        f"another process is working in {run_folder}; wait for it, or choose name=<new>"
                    ) from error
                time.sleep(0.5)
        check_links(run_folder, but=["wandb"])  # wandb links its own logs into the user's cache
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        with held(run_folder):
            yield


def decide(stage: Step, run_folder: Path, defaults: dict[str, Any]) -> str:
    """Returns "skip", "resume" or "run". Raises Refused if the folder holds a stage with another key."""
    note = read_note(run_folder / stage.name)
    if note is None:
        return "run"
    if changed := differences(note["key"], json.loads(json.dumps(stage.key())), defaults):
        listed = "\n  ".join(changed[:12] + (["..."] if len(changed) > 12 else []))
        raise Refused(
            f"{run_folder / stage.name} was made with other settings:\n  {listed}\nChoose name=<new> for a new run, or "
            f"restart={stage.name} to run this stage and the later ones again (the old ones go to {run_folder}/.replaced)"
        )
    return "skip" if is_done(note, stage) else "resume"


def check_chain(
    order: Order,
    chain: Sequence[Step],
    run_folder: Path,
    defaults: dict[str, Any],
    restart: str | None = None,
    binding: Sequence[Step] = (),
) -> None:
    """Raises Refused, before anything is changed, if a stage was made with other settings, or if training it further
    would leave later stages that were made from its old weights. restart: the stages that it sets aside count as
    absent. binding: stages outside the chain whose settings must not differ either."""
    names, gone = [step.name for step in chain], made_anew(order, chain, run_folder, restart)
    if restart and restart not in names:
        raise Refused(
            f"restart={restart} is not in stages=[{','.join(names)}], so nothing would run it again; add it to stages"
        )
    for name, needed in [(n, needed) for n in names for needed in order.needs(n) if needed not in names]:
        if needed in gone:
            raise Refused(
                f"restart={restart} sets {needed} aside, which {name} needs and stages=[{','.join(names)}] does not "
                f"make; add it to the stages. Nothing has been changed"
            )
        order.result_of(run_folder, needed)  # raises Refused if it is not finished
    for step in binding:
        decide(step, run_folder, defaults)
    new: set[str] = set()  # stages that will be made by this command
    for step in chain:
        anew = step.name in gone or bool(new & set(order.needs(step.name)))
        action = "run" if anew else decide(step, run_folder, defaults)
        if action != "skip":
            new.add(step.name)
        if action == "resume":
            _check_later(order, step, run_folder, gone)


def _check_later(order: Order, step: Step, run_folder: Path, gone: Sequence[str]) -> None:
    """Raises Refused if training a stage further would leave stages that were made from its old weights."""
    made = [s for s in order.later_than(step.name) if s not in gone and read_note(run_folder / s)]
    note = read_note(run_folder / step.name)
    if note and made:
        reached = f"has {note['steps']} steps" if note["finished"] else "is unfinished"
        raise Refused(
            f"{run_folder / step.name} {reached} and {step.steps} are asked for, but {', '.join(made)} were made from its "
            f"present weights and would become stale. Nothing has been changed. Choose restart={made[0]} to go on and make "
            f"them anew (the old ones go to {run_folder}/.replaced), name=<new> for a new run, or "
            f"{step.name}.max_steps={note['steps'] or step.steps} to keep what is there"
        )


def adopt(stage: Step, run_folder: Path, defaults: dict[str, Any]) -> bool:
    """Takes over a stage that a sibling run (of the same sweep) finished with an equal key and the same number of
    steps. Returns False if there is none. Files are hard-linked where the file system allows it; this is safe because
    a stage that trains replaces existing files and never writes into them."""
    key = json.loads(json.dumps(stage.key()))
    for path in sorted(run_folder.parent.glob(f"*/{stage.name}/{NOTE}")):
        try:
            note = read_note(path.parent)
        except Refused:  # damaged, which the run that owns it reports
            continue
        if note and note["finished"] and note["steps"] == stage.steps and not differences(note["key"], key, defaults):
            partial = run_folder / f".{stage.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(path.parent, partial, copy_function=link_or_copy)
            partial.rename(run_folder / stage.name)
            return True
    return False


@contextmanager
def sibling_lock(stage: Step, run_folder: Path) -> Iterator[None]:
    """A context that locks a stage, identified by its key and steps, among the runs of a sweep: sibling runs that need
    the same stage wait, and then take it over. The lock of a run that fails or is killed is released at once."""
    tree = json.dumps([stage.key(), stage.steps], sort_keys=True, default=str)
    path = run_folder.parent / ".locks" / f"{stage.name}-{hashlib.sha256(tree.encode()).hexdigest()[:16]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_lock(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"{stage.name}: waiting for {file.read().strip() or 'another run'}, which makes the same", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate()
        file.write(run_folder.name)
        file.flush()
        yield


def advance(stage: Step, run_folder: Path, defaults: dict[str, Any], writer: bool, share: bool = False) -> str:
    """Does what `decide` says and returns it, or "share" if a sibling run's stage was taken over. Only the `writer`
    (rank 0) writes stage.json."""
    folder, action = run_folder / stage.name, decide(stage, run_folder, defaults)
    if action == "skip":
        return action
    with sibling_lock(stage, run_folder) if share else nullcontext():
        if action == "run" and share and adopt(stage, run_folder, defaults):
            return "share"
        note = {"key": stage.key(), "finished": False, "steps": 0, "result": {}}
        if writer:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / NOTE, note)
        interrupts.during(f"in the stage {stage.name}")
        result = stage.run(folder)
        if writer:
            write_json(folder / NOTE, note | {"finished": True, "steps": stage.steps, "result": result})
        return action
