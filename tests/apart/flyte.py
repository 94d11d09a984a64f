"""What Flyte does with a package, without Flyte: it walks the workflows and starts a pod for each task.

Only what propeller does with these packages is here, and as it does it: see the comments where that is not obvious.
"""

import io
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flyteidl.core.condition_pb2 import BooleanExpression, ComparisonExpression, ConjunctionExpression, Operand
from flyteidl.core.dynamic_job_pb2 import DynamicJobSpec
from flyteidl.core.errors_pb2 import ContainerError, ErrorDocument
from flyteidl.core.execution_pb2 import ExecutionError
from flyteidl.core.literals_pb2 import Binding, BindingData, Literal, LiteralMap
from flyteidl.core.tasks_pb2 import TaskTemplate
from flyteidl.core.workflow_pb2 import Node, WorkflowTemplate
from flytekit.constants import CopyFileDetection
from flytekit.tools.fast_registration import FastPackageOptions, fast_package

from tests.apart.literals import Literals, attribute, cache_key, error_of, is_error, value_of
from tests.apart.package import Package
from tests.apart.pods import LONGEST, Interrupt, NoPod, Pods

PROJECT, BUCKET = "homelab", "flyte"
SYSTEM_RETRIES = 3  # propeller's max-node-retries-system-failures
DONE = ("SUCCEEDED", "RECOVERED")
Scope = dict[str, Literals]  # outputs by node; those of the start node, "", are the workflow's inputs
COMPARE: dict[int, Callable[[Any, Any], bool]] = {
    ComparisonExpression.EQ: lambda left, right: left == right,
    ComparisonExpression.NEQ: lambda left, right: left != right,
    ComparisonExpression.GT: lambda left, right: left > right,
    ComparisonExpression.GTE: lambda left, right: left >= right,
    ComparisonExpression.LT: lambda left, right: left < right,
    ComparisonExpression.LTE: lambda left, right: left <= right,
}


@dataclass
class Ran:
    """What became of a node."""

    task: str = ""  # empty for those that only hold others
    phase: str = "RUNNING"  # or SUCCEEDED, FAILED, RECOVERED, SKIPPED
    cache: str = ""  # or HIT, POPULATED
    attempts: int = 0
    seconds: float = 0.0
    log: str = ""  # of all attempts
    error: str = ""
    outputs: Literals = field(default_factory=dict)
    job: DynamicJobSpec | None = None  # what a dynamic task wants to be run

    def value(self, name: str = "o0") -> Any:
        """One of the outputs."""
        return value_of(self.outputs[name])


@dataclass
class Execution:
    """An execution and its nodes, by path: `train/n0/n0` is in the branch n0 of the workflow of the node train."""

    name: str
    started: str  # the launch plan
    inputs: Literals
    sent: str = ""  # where code that was sent is
    phase: str = "RUNNING"  # or SUCCEEDED, FAILED, STOPPED (as was asked)
    error: str = ""
    outputs: Literals = field(default_factory=dict)
    nodes: dict[str, Ran] = field(default_factory=dict)

    def value(self, name: str = "o0") -> Any:
        """One of the outputs."""
        return value_of(self.outputs[name])

    def of(self, name: str) -> Ran:
        """The node of a path, or of a task that has one node only."""
        found = [ran for path, ran in self.nodes.items() if is_named(name, path, ran)]
        assert len(found) == 1, f"{self.name} has {len(found)} nodes {name}: {list(self.nodes)}"
        return found[0]

    def cache(self) -> dict[str, str]:
        """What the cache said, by the path of each node whose task is cached."""
        return {path: ran.cache for path, ran in self.nodes.items() if ran.cache}


def is_named(name: str, path: str, ran: Ran) -> bool:
    """Whether a name is that of a node: its path, or its task's last part (map tasks: of the task that they map)."""
    own = ran.task.rpartition(".")[2]
    mapped = re.fullmatch(r"map_(\w+)_[0-9a-f]{32}-arraynode", own)
    return name in (path, mapped[1] if mapped else own)


class Failed(Exception):
    """A node failed; `system` says whose fault it was, `again` whether another attempt may help."""

    def __init__(self, message: str, *, again: bool = False, system: bool = False) -> None:
        super().__init__(message)
        self.again, self.system, self.node = again, system, ""


class Stopped(Exception):
    """All that was asked for has been run."""


class Flyte:
    """Runs a package's launch plans in a domain. What is cached stays cached for all executions of this object."""

    def __init__(self, package: Package, pods: Pods, domain: str = "production") -> None:
        self.package, self.pods, self.domain = package, pods, domain
        self.catalog: dict[str, Literals] = {}
        self.executions = 0
        self.store = pods.services.s3("flyte")

    def run(
        self, name: str, inputs: dict[str, Any] | None = None, *, sent: Path | None = None, **how: Any
    ) -> Execution:
        """Start a launch plan and follow it to its end.

        `sent` is a directory of code that goes to the pods, as `pyflyte run --remote --copy all` sends it. `until`,
        `before` and `interrupt` name nodes by path or by task: where to stop, what to call before a node's first
        attempt, and how to end that attempt.
        """
        _, bound = self.package.started(name, inputs or {})
        return self._follow(Execution(self._name(), name, bound, self._send(sent) if sent else ""), {}, **how)

    def recover(self, execution: Execution, **how: Any) -> Execution:
        """Start an execution again (`--recover`): what succeeded in it, its failure node too, is taken from it."""
        again = Execution(self._name(), execution.started, execution.inputs, execution.sent)
        return self._follow(again, execution.nodes, **how)

    def _name(self) -> str:
        self.executions += 1
        return f"f{secrets.token_hex(9)}"

    def _send(self, directory: Path) -> str:
        options = FastPackageOptions([], copy_style=CopyFileDetection.ALL)
        with TemporaryDirectory() as folder:
            archive = Path(str(fast_package(directory, folder, options=options)))
            key = f"{PROJECT}/{self.domain}/{archive.name}"
            self.store.fput_object(BUCKET, key, str(archive))
        return f"s3://{BUCKET}/{key}"

    def _follow(
        self,
        execution: Execution,
        earlier: dict[str, Ran],
        *,
        until: str = "",
        before: dict[str, Callable[[], Any]] | None = None,
        interrupt: dict[str, Interrupt] | None = None,
    ) -> Execution:
        walk = Walk(self, execution, earlier, until, before or {}, interrupt or {}, self.executions)
        workflow = self.package.workflows[self.package.plans[execution.started].spec.workflow_id.name]
        try:
            execution.outputs = walk.workflow(workflow, execution.inputs, "")
            execution.phase = "SUCCEEDED"
        except Stopped:
            execution.phase = "STOPPED"
        except Failed as failure:
            execution.phase, execution.error = "FAILED", str(failure)
        return execution


@dataclass
class Walk:
    """One execution under way."""

    flyte: Flyte
    execution: Execution
    earlier: dict[str, Ran]
    until: str
    before: dict[str, Callable[[], Any]]
    interrupt: dict[str, Interrupt]
    turn: int  # by how far the keys of what is encoded anew are turned
    tasks: dict[str, TaskTemplate] = field(default_factory=dict)  # of dynamic jobs
    workflows: dict[str, WorkflowTemplate] = field(default_factory=dict)

    def workflow(self, template: WorkflowTemplate, inputs: Literals, path: str) -> Literals:
        """Run a workflow's nodes, and its failure node where one of them fails; returns the outputs."""
        try:
            return self.nodes(template.nodes, template.outputs, inputs, path)
        except Failed as failure:
            if template.HasField("failure_node"):
                handler = template.failure_node
                declared = self.task(handler.task_node.reference_id.name).interface.inputs.variables
                errors = {
                    key: error_of(str(failure), failure.node, one.type)
                    for key, one in declared.items()
                    if is_error(one.type)
                }
                self.node(handler, {"": inputs}, path, errors)
            raise

    def nodes(self, nodes: Iterable[Node], outputs: Iterable[Binding], inputs: Literals, path: str) -> Literals:
        """Run nodes one by one, each after those that it needs."""
        scope: Scope = {"": inputs, "start-node": inputs}
        waiting = [one for one in nodes if one.id not in ("start-node", "end-node")]
        while waiting:
            ids = {one.id for one in waiting}
            node = next(one for one in waiting if not ids & set(one.upstream_node_ids))
            waiting.remove(node)
            scope[node.id] = self.node(node, scope, path)
        return self.bind(outputs, scope)

    def node(self, node: Node, scope: Scope, path: str, more: Literals | None = None) -> Literals:
        """Run a node, or take it from the earlier execution; Failed and Stopped go through."""
        path = f"{path}/{node.id}".lstrip("/")
        ran = self.execution.nodes[path] = Ran(node.task_node.reference_id.name)
        if path in self.earlier and self.earlier[path].phase in DONE:
            for one, was in self.earlier.items():
                if (one == path or one.startswith(f"{path}/")) and was.phase in DONE:
                    self.execution.nodes[one] = Ran(was.task, "RECOVERED", outputs=was.outputs)
            return self.earlier[path].outputs
        try:
            inputs = {**self.bind(node.inputs, scope), **(more or {})}
            target = node.WhichOneof("target")
            if target == "task_node":
                ran.outputs = self.cached(self.task(ran.task), inputs, lambda: self.attempts(node, inputs, path), ran)
            elif target == "branch_node":
                ran.outputs = self.branch(node, inputs, scope, path)
            elif target == "array_node":
                ran.outputs = self.array(node, inputs, path)
            elif target == "workflow_node" and node.workflow_node.HasField("sub_workflow_ref"):
                name = node.workflow_node.sub_workflow_ref.name
                template = self.workflows.get(name) or self.flyte.package.workflows[name]
                ran.outputs = self.workflow(template, inputs, path)
            else:
                raise AssertionError(f"{path}: nodes of kind {target} are in no package of ours")
        except Failed as failure:
            failure.node = node.id
            ran.phase, ran.error = "FAILED", str(failure)
            raise
        ran.phase = "SUCCEEDED"
        if self.until and is_named(self.until, path, ran):
            raise Stopped
        return ran.outputs

    def task(self, name: str) -> TaskTemplate:
        """A task by its name."""
        return self.tasks.get(name) or self.flyte.package.tasks[name]

    def bind(self, bindings: Iterable[Binding], scope: Scope) -> dict[str, Literal]:
        """What variables are bound to."""
        return {one.var: self.literal(one.binding, scope) for one in bindings}

    def literal(self, binding: BindingData, scope: Scope) -> Literal:
        """What a binding comes to."""
        kind, found = binding.WhichOneof("value"), Literal()
        if kind == "promise":
            promise = binding.promise
            return attribute(scope[promise.node_id][promise.var], list(promise.attr_path), self.turn)
        if kind == "collection":
            found.collection.SetInParent()
            found.collection.literals.extend(self.literal(one, scope) for one in binding.collection.bindings)
        elif kind == "map":
            found.map.SetInParent()
            for key, one in binding.map.bindings.items():
                found.map.literals[key].CopyFrom(self.literal(one, scope))
        else:
            found.scalar.CopyFrom(binding.scalar)
        return found

    def branch(self, node: Node, inputs: Literals, scope: Scope, path: str) -> Literals:
        """Run the first case that holds; the others are skipped."""
        block = node.branch_node.if_else
        cases = [block.case, *block.other]
        taken = next((one.then_node for one in cases if holds(one.condition, inputs)), None)
        if taken is None and block.HasField("else_node"):
            taken = block.else_node
        for one in [*(case.then_node for case in cases), *([block.else_node] if block.HasField("else_node") else [])]:
            if taken is None or one.id != taken.id:
                self.execution.nodes[f"{path}/{one.id}"] = Ran(one.task_node.reference_id.name, "SKIPPED")
        if taken is None:
            raise Failed(block.error.message)
        return self.node(taken, scope, path)

    def array(self, node: Node, inputs: Literals, path: str) -> Literals:
        """Run a map task: one pod for each element, which gets the whole lists and its number."""
        array, bound = node.array_node, set(node.array_node.bound_inputs)
        lists = {key: one for key, one in inputs.items() if one.HasField("collection") and key not in bound}
        (size,) = {len(one.collection.literals) for one in lists.values()}
        reference, found, failures = array.node.task_node.reference_id.name, [], []
        needed = array.min_successes or size
        if array.WhichOneof("success_criteria") == "min_success_ratio":
            needed = -(-size * array.min_success_ratio // 1)
        for index in range(size):
            inside = f"{path}/{index}"
            ran = self.execution.nodes[inside] = Ran(reference)
            own = {**inputs, **{key: one.collection.literals[index] for key, one in lists.items()}}
            env = {"BATCH_JOB_ARRAY_INDEX_VAR_NAME": "FLYTE_K8S_ARRAY_INDEX", "FLYTE_K8S_ARRAY_INDEX": str(index)}

            def attempts(inside: str = inside, env: dict[str, str] = env) -> Literals:
                return self.attempts(array.node, inputs, inside, env)

            try:
                ran.outputs = self.cached(self.task(reference), own, attempts, ran)
                ran.phase = "SUCCEEDED"
                found.append(ran.outputs)
            except Failed as failure:
                ran.phase, ran.error = "FAILED", str(failure)
                failures.append(f"[{index}]: {failure}")
                found.append({})
        if size - len(failures) < needed:
            raise Failed("\n".join(failures))
        outputs: dict[str, Literal] = {}
        for key in self.task(reference).interface.outputs.variables:
            outputs[key] = Literal()
            outputs[key].collection.SetInParent()
            outputs[key].collection.literals.extend(one.get(key, NOTHING) for one in found)
        return outputs

    def cached(self, task: TaskTemplate, inputs: Literals, run: Callable[[], Literals], ran: Ran) -> Literals:
        """A task's outputs, from the catalog where it has them."""
        if not task.metadata.discoverable:
            return run()
        key = cache_key(task, inputs)
        if key in self.flyte.catalog:
            ran.cache = "HIT"
            return self.flyte.catalog[key]
        outputs = self.flyte.catalog[key] = run()
        ran.cache = "POPULATED"
        return outputs

    def attempts(self, node: Node, inputs: Literals, path: str, env: Mapping[str, str] | None = None) -> Literals:
        """Run a task until it succeeds or may not be tried again, and what it wants to be run, where it is dynamic."""
        ran = self.execution.nodes[path]
        if path in self.earlier and self.earlier[path].job:
            ran.job = self.earlier[path].job  # its nodes failed, not the task itself
        self.write(f"{path}/data/inputs.pb", LiteralMap(literals=inputs).SerializeToString())
        for name, call in self.before.items():
            if is_named(name, path, ran):
                call()
        retries = {True: SYSTEM_RETRIES, False: node.metadata.retries.retries}
        outputs: Literals | None = None
        while outputs is None and ran.job is None:
            try:
                outputs = self.attempt(node, path, ran, env or {})
            except Failed as failure:
                retries[failure.system] -= 1
                if not failure.again or retries[failure.system] < 0:
                    raise
        if ran.job is None:
            return outputs or {}
        self.tasks |= {one.id.name: one for one in ran.job.tasks}
        self.workflows |= {one.id.name: one for one in ran.job.subworkflows}
        return self.nodes(ran.job.nodes, ran.job.outputs, inputs, path)

    def attempt(self, node: Node, path: str, ran: Ran, env: Mapping[str, str]) -> Literals | None:
        """One pod of a task; Failed says why it did not succeed. None where the task wants more to be run."""
        task, name, number = self.task(ran.task), f"{self.execution.name}-{path}", ran.attempts
        outputs, raw = f"{path}/data/{number}", f"s3://{BUCKET}/data/{self.execution.name}/{path}"
        args = {
            "{{.input}}": self.uri(f"{path}/data/inputs.pb"),
            "{{.outputPrefix}}": self.uri(outputs),
            "{{.rawOutputDataPrefix}}": f"{raw}/{number}",
            "{{.checkpointOutputPrefix}}": f"{raw}/{number}/_flytecheckpoints",
            "{{.prevCheckpointPrefix}}": f"{raw}/{number - 1}/_flytecheckpoints" if number else '""',
        }
        prefix = []
        if self.execution.sent and ran.task not in self.tasks:  # dynamic tasks have it in those that they make
            prefix = ["pyflyte-fast-execute", "--additional-distribution", self.execution.sent, "--dest-dir", ".", "--"]
        interrupt = next((one for key, one in self.interrupt.items() if is_named(key, path, ran)), None)
        ran.attempts += 1
        started = time.monotonic()
        try:
            ended = self.flyte.pods.run(
                f"{name}-{number}",
                f"{PROJECT}-{self.flyte.domain}",
                task,
                args,
                {**self.own(task, number), **env},
                prefix=prefix,
                seconds=node.metadata.timeout.seconds or LONGEST,
                interrupt=interrupt if number == 0 else None,
            )
        except NoPod as refusal:
            raise Failed(str(refusal)) from None
        finally:
            ran.seconds += time.monotonic() - started
        ran.log += ended.log
        if ended.error:
            raise Failed(ended.error)
        if ended.code:  # also by a signal: Flyte takes an end without a word for the node's fault
            last = "\n".join(ended.log.strip().splitlines()[-20:])
            raise Failed(f"{path}: exit code {ended.code}\n{last}", again=True, system=True)
        files = self.files(outputs)
        # They count, whatever lies beside them; each worker of a job has its own, and the first is the cause.
        if errors := [self.read(key) for name, key in files.items() if re.fullmatch(r"error.*\.pb", name)]:
            documents = [ErrorDocument.FromString(one).error for one in errors]
            error = min(documents, key=lambda one: one.timestamp.ToNanoseconds())
            again, system = error.kind == ContainerError.RECOVERABLE, error.origin == ExecutionError.SYSTEM
            raise Failed(error.message, again=again, system=system)
        if "futures.pb" in files:
            ran.job = DynamicJobSpec.FromString(self.read(files["futures.pb"]))
            return None
        if "outputs.pb" not in files:
            raise Failed("outputs not generated by task execution", again=True, system=True)
        return dict(LiteralMap.FromString(self.read(files["outputs.pb"])).literals)

    def own(self, task: TaskTemplate, attempt: int) -> dict[str, str]:
        """The variables that Flyte gives each pod."""
        return {
            "FLYTE_INTERNAL_EXECUTION_ID": self.execution.name,
            "FLYTE_INTERNAL_EXECUTION_PROJECT": PROJECT,
            "FLYTE_INTERNAL_EXECUTION_DOMAIN": self.flyte.domain,
            "FLYTE_ATTEMPT_NUMBER": str(attempt),
            "FLYTE_INTERNAL_TASK_PROJECT": PROJECT,
            "FLYTE_INTERNAL_TASK_DOMAIN": self.flyte.domain,
            "FLYTE_INTERNAL_TASK_NAME": task.id.name,
            "FLYTE_INTERNAL_TASK_VERSION": "abc",
        }

    def uri(self, path: str) -> str:
        """Where a file of this execution is."""
        return f"s3://{BUCKET}/metadata/{PROJECT}-{self.flyte.domain}-{self.execution.name}/{path}"

    def write(self, path: str, data: bytes) -> None:
        """Write a file of this execution."""
        key = self.uri(path).removeprefix(f"s3://{BUCKET}/")
        self.flyte.store.put_object(BUCKET, key, io.BytesIO(data), len(data))

    def files(self, path: str) -> dict[str, str]:
        """The keys of the files in a folder of this execution, by name."""
        prefix = self.uri(path).removeprefix(f"s3://{BUCKET}/") + "/"
        found = [str(one.object_name) for one in self.flyte.store.list_objects(BUCKET, prefix)]
        return {key.removeprefix(prefix): key for key in found}

    def read(self, key: str) -> bytes:
        """What a file holds."""
        with self.flyte.store.get_object(BUCKET, key) as answer:
            return answer.read()


NOTHING = Literal()
NOTHING.scalar.none_type.SetInParent()


def holds(condition: BooleanExpression, inputs: Literals) -> bool:
    """Whether the condition of a branch holds."""
    if condition.HasField("conjunction"):
        both = condition.conjunction
        sides = holds(both.left_expression, inputs), holds(both.right_expression, inputs)
        return all(sides) if both.operator == ConjunctionExpression.AND else any(sides)
    comparison = condition.comparison
    return COMPARE[comparison.operator](operand(comparison.left_value, inputs), operand(comparison.right_value, inputs))


def operand(side: Operand, inputs: Literals) -> Any:
    """One side of a comparison: propeller compares primitives alone."""
    if side.HasField("primitive"):
        return getattr(side.primitive, side.primitive.WhichOneof("value"))
    literal = inputs[side.var] if side.HasField("var") else Literal(scalar=side.scalar)
    if literal.scalar.WhichOneof("value") != "primitive":
        raise Failed(f"only primitives can be compared: {side.var} is none")
    return value_of(literal)
