"""A stand-in for Flyte: walks a package's workflows and starts a pod for each task.

It implements only the parts of propeller that these packages use. Comments explain behaviour that is not obvious.
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
from tests.apart.pods import MAX_SECONDS, Interrupt, PodRejected, Pods

PROJECT, BUCKET = "homelab", "flyte"
SYSTEM_RETRIES = 3  # propeller's max-node-retries-system-failures
DONE = ("SUCCEEDED", "RECOVERED")
Scope = dict[str, Literals]  # outputs by node id; those of the start node, "", are the workflow's inputs
COMPARE: dict[int, Callable[[Any, Any], bool]] = {
    ComparisonExpression.EQ: lambda left, right: left == right,
    ComparisonExpression.NEQ: lambda left, right: left != right,
    ComparisonExpression.GT: lambda left, right: left > right,
    ComparisonExpression.GTE: lambda left, right: left >= right,
    ComparisonExpression.LT: lambda left, right: left < right,
    ComparisonExpression.LTE: lambda left, right: left <= right,
}


@dataclass
class NodeRun:
    """The result of one node."""

    task: str = ""  # empty for a node that only contains others
    phase: str = "RUNNING"  # or SUCCEEDED, FAILED, RECOVERED, SKIPPED
    cache_status: str = ""  # or HIT, POPULATED
    attempts: int = 0
    seconds: float = 0.0
    log: str = ""  # of all attempts
    error: str = ""
    outputs: Literals = field(default_factory=dict)
    job: DynamicJobSpec | None = None  # what a dynamic task has generated

    def value(self, name: str = "o0") -> Any:
        """The value of an output."""
        return value_of(self.outputs[name])


@dataclass
class Execution:
    """An execution and its nodes by path: `train/n0/n0` is node n0 of the branch node n0 in the subworkflow train."""

    name: str
    launch_plan: str
    inputs: Literals
    uploaded: str = ""  # URI of uploaded code
    phase: str = "RUNNING"  # or SUCCEEDED, FAILED, STOPPED (by `until`)
    error: str = ""
    outputs: Literals = field(default_factory=dict)
    nodes: dict[str, NodeRun] = field(default_factory=dict)

    def value(self, name: str = "o0") -> Any:
        """The value of an output."""
        return value_of(self.outputs[name])

    def node(self, name: str) -> NodeRun:
        """The node with a path, or the only node of a task."""
        found = [run for path, run in self.nodes.items() if is_named(name, path, run)]
        assert len(found) == 1, f"{self.name} has {len(found)} nodes named {name}: {list(self.nodes)}"
        return found[0]

    def cache_status(self) -> dict[str, str]:
        """The cache status of each node whose task is cached, by path."""
        return {path: run.cache_status for path, run in self.nodes.items() if run.cache_status}


def is_named(name: str, path: str, run: NodeRun) -> bool:
    """Whether a name refers to a node: by path, or by its task's function (for a map task, the mapped function)."""
    function = run.task.rpartition(".")[2]
    mapped = re.fullmatch(r"map_(\w+)_[0-9a-f]{32}-arraynode", function)
    return name in (path, mapped[1] if mapped else function)


class NodeFailed(Exception):
    """A node failed. A `recoverable` failure is retried; `system` marks one that is not the user's fault."""

    def __init__(self, message: str, *, recoverable: bool = False, system: bool = False) -> None:
        super().__init__(message)
        self.recoverable, self.system, self.node = recoverable, system, ""


class Stopped(Exception):
    """The node named by `until` has run."""


class Flyte:
    """Runs a package's launch plans in a domain. All executions of one object share its cache."""

    def __init__(self, package: Package, pods: Pods, domain: str = "production") -> None:
        self.package, self.pods, self.domain = package, pods, domain
        self.catalog: dict[str, Literals] = {}
        self.executions = 0
        self.store = pods.services.s3("flyte")

    def run(
        self, name: str, inputs: dict[str, Any] | None = None, *, upload: Path | None = None, **options: Any
    ) -> Execution:
        """Run a launch plan to its end.

        `upload` is a directory of code for the pods, as in `pyflyte run --remote --copy all`. Three options name nodes
        by path or by task: `until`, where to stop; `before`, what to call before a node's first attempt; `interrupt`,
        how to end that attempt.
        """
        _, bound = self.package.resolve(name, inputs or {})
        execution = Execution(self._new_name(), name, bound, self._upload(upload) if upload else "")
        return self._execute(execution, {}, **options)

    def recover(self, execution: Execution, **options: Any) -> Execution:
        """Recover an execution (`--recover`): nodes that succeeded, its failure node included, do not run again."""
        recovery = Execution(self._new_name(), execution.launch_plan, execution.inputs, execution.uploaded)
        return self._execute(recovery, execution.nodes, **options)

    def _new_name(self) -> str:
        self.executions += 1
        return f"f{secrets.token_hex(9)}"

    def _upload(self, directory: Path) -> str:
        options = FastPackageOptions([], copy_style=CopyFileDetection.ALL)
        with TemporaryDirectory() as folder:
            archive = Path(str(fast_package(directory, folder, options=options)))
            key = f"{PROJECT}/{self.domain}/{archive.name}"
            self.store.fput_object(BUCKET, key, str(archive))
        return f"s3://{BUCKET}/{key}"

    def _execute(
        self,
        execution: Execution,
        earlier: dict[str, NodeRun],
        *,
        until: str = "",
        before: dict[str, Callable[[], Any]] | None = None,
        interrupt: dict[str, Interrupt] | None = None,
    ) -> Execution:
        walk = Walk(self, execution, earlier, until, before or {}, interrupt or {}, self.executions)
        workflow = self.package.workflows[self.package.plans[execution.launch_plan].spec.workflow_id.name]
        try:
            execution.outputs = walk.workflow(workflow, execution.inputs, "")
            execution.phase = "SUCCEEDED"
        except Stopped:
            execution.phase = "STOPPED"
        except NodeFailed as failure:
            execution.phase, execution.error = "FAILED", str(failure)
        return execution


@dataclass
class Walk:
    """One execution in progress."""

    flyte: Flyte
    execution: Execution
    earlier: dict[str, NodeRun]
    until: str
    before: dict[str, Callable[[], Any]]
    interrupt: dict[str, Interrupt]
    rotation: int  # places by which map keys are rotated when a value is encoded again
    tasks: dict[str, TaskTemplate] = field(default_factory=dict)  # generated by dynamic tasks
    workflows: dict[str, WorkflowTemplate] = field(default_factory=dict)

    def workflow(self, template: WorkflowTemplate, inputs: Literals, path: str) -> Literals:
        """Run a workflow's nodes, and its failure node if one of them fails; returns the outputs."""
        try:
            return self.nodes(template.nodes, template.outputs, inputs, path)
        except NodeFailed as failure:
            if template.HasField("failure_node"):
                handler = template.failure_node
                declared = self.task(handler.task_node.reference_id.name).interface.inputs.variables
                errors = {
                    key: error_of(str(failure), failure.node, variable.type)
                    for key, variable in declared.items()
                    if is_error(variable.type)
                }
                self.node(handler, {"": inputs}, path, errors)
            raise

    def nodes(self, nodes: Iterable[Node], outputs: Iterable[Binding], inputs: Literals, path: str) -> Literals:
        """Run nodes one by one, each after its upstream nodes."""
        scope: Scope = {"": inputs, "start-node": inputs}
        waiting = [node for node in nodes if node.id not in ("start-node", "end-node")]
        while waiting:
            ids = {node.id for node in waiting}
            node = next(node for node in waiting if not ids & set(node.upstream_node_ids))
            waiting.remove(node)
            scope[node.id] = self.node(node, scope, path)
        return self.bind(outputs, scope)

    def node(self, node: Node, scope: Scope, path: str, extra: Literals | None = None) -> Literals:
        """Run a node, or take its outputs from the earlier execution. NodeFailed and Stopped propagate."""
        path = f"{path}/{node.id}".lstrip("/")
        run = self.execution.nodes[path] = NodeRun(node.task_node.reference_id.name)
        if path in self.earlier and self.earlier[path].phase in DONE:
            for inner, past in self.earlier.items():
                if (inner == path or inner.startswith(f"{path}/")) and past.phase in DONE:
                    self.execution.nodes[inner] = NodeRun(past.task, "RECOVERED", outputs=past.outputs)
            return self.earlier[path].outputs
        try:
            inputs = {**self.bind(node.inputs, scope), **(extra or {})}
            target = node.WhichOneof("target")
            if target == "task_node":
                run.outputs = self.cached(self.task(run.task), inputs, lambda: self.attempts(node, inputs, path), run)
            elif target == "branch_node":
                run.outputs = self.branch(node, inputs, scope, path)
            elif target == "array_node":
                run.outputs = self.array(node, inputs, path)
            elif target == "workflow_node" and node.workflow_node.HasField("sub_workflow_ref"):
                name = node.workflow_node.sub_workflow_ref.name
                template = self.workflows.get(name) or self.flyte.package.workflows[name]
                run.outputs = self.workflow(template, inputs, path)
            else:
                raise AssertionError(f"{path}: a node of kind {target} is not supported")
        except NodeFailed as failure:
            failure.node = node.id
            run.phase, run.error = "FAILED", str(failure)
            raise
        run.phase = "SUCCEEDED"
        if self.until and is_named(self.until, path, run):
            raise Stopped
        return run.outputs

    def task(self, name: str) -> TaskTemplate:
        """The task with a name."""
        return self.tasks.get(name) or self.flyte.package.tasks[name]

    def bind(self, bindings: Iterable[Binding], scope: Scope) -> dict[str, Literal]:
        """The literals that variables are bound to."""
        return {binding.var: self.literal(binding.binding, scope) for binding in bindings}

    def literal(self, binding: BindingData, scope: Scope) -> Literal:
        """The literal that a binding resolves to."""
        kind, found = binding.WhichOneof("value"), Literal()
        if kind == "promise":
            promise = binding.promise
            return attribute(scope[promise.node_id][promise.var], list(promise.attr_path), self.rotation)
        if kind == "collection":
            found.collection.SetInParent()
            found.collection.literals.extend(self.literal(item, scope) for item in binding.collection.bindings)
        elif kind == "map":
            found.map.SetInParent()
            for key, item in binding.map.bindings.items():
                found.map.literals[key].CopyFrom(self.literal(item, scope))
        else:
            found.scalar.CopyFrom(binding.scalar)
        return found

    def branch(self, node: Node, inputs: Literals, scope: Scope, path: str) -> Literals:
        """Run the first case whose condition holds, and mark the others as skipped."""
        block = node.branch_node.if_else
        cases = [block.case, *block.other]
        taken = next((case.then_node for case in cases if holds(case.condition, inputs)), None)
        if taken is None and block.HasField("else_node"):
            taken = block.else_node
        for then in [*(case.then_node for case in cases), *([block.else_node] if block.HasField("else_node") else [])]:
            if taken is None or then.id != taken.id:
                self.execution.nodes[f"{path}/{then.id}"] = NodeRun(then.task_node.reference_id.name, "SKIPPED")
        if taken is None:
            raise NodeFailed(block.error.message)
        return self.node(taken, scope, path)

    def array(self, node: Node, inputs: Literals, path: str) -> Literals:
        """Run a map task: one pod per element, which gets the whole lists and its index."""
        array, bound = node.array_node, set(node.array_node.bound_inputs)
        lists = {key: value for key, value in inputs.items() if value.HasField("collection") and key not in bound}
        (size,) = {len(value.collection.literals) for value in lists.values()}
        reference, found, failures = array.node.task_node.reference_id.name, [], []
        needed = array.min_successes or size
        if array.WhichOneof("success_criteria") == "min_success_ratio":
            needed = -(-size * array.min_success_ratio // 1)
        for index in range(size):
            element_path = f"{path}/{index}"
            run = self.execution.nodes[element_path] = NodeRun(reference)
            element_inputs = {**inputs, **{key: value.collection.literals[index] for key, value in lists.items()}}
            env = {"BATCH_JOB_ARRAY_INDEX_VAR_NAME": "FLYTE_K8S_ARRAY_INDEX", "FLYTE_K8S_ARRAY_INDEX": str(index)}

            def attempts(element_path: str = element_path, env: dict[str, str] = env) -> Literals:
                return self.attempts(array.node, inputs, element_path, env)

            try:
                run.outputs = self.cached(self.task(reference), element_inputs, attempts, run)
                run.phase = "SUCCEEDED"
                found.append(run.outputs)
            except NodeFailed as failure:
                run.phase, run.error = "FAILED", str(failure)
                failures.append(f"[{index}]: {failure}")
                found.append({})
        if size - len(failures) < needed:
            raise NodeFailed("\n".join(failures))
        outputs: dict[str, Literal] = {}
        for key in self.task(reference).interface.outputs.variables:
            outputs[key] = Literal()
            outputs[key].collection.SetInParent()
            outputs[key].collection.literals.extend(element.get(key, NONE) for element in found)
        return outputs

    def cached(self, task: TaskTemplate, inputs: Literals, compute: Callable[[], Literals], run: NodeRun) -> Literals:
        """A task's outputs, from the catalog if it has them."""
        if not task.metadata.discoverable:
            return compute()
        key = cache_key(task, inputs)
        if key in self.flyte.catalog:
            run.cache_status = "HIT"
            return self.flyte.catalog[key]
        outputs = self.flyte.catalog[key] = compute()
        run.cache_status = "POPULATED"
        return outputs

    def attempts(self, node: Node, inputs: Literals, path: str, env: Mapping[str, str] | None = None) -> Literals:
        """Run a task until it succeeds or has no retries left, then the nodes that it generates if it is dynamic."""
        run = self.execution.nodes[path]
        if path in self.earlier and self.earlier[path].job:
            run.job = self.earlier[path].job  # its nodes failed, not the task itself
        self.write(f"{path}/data/inputs.pb", LiteralMap(literals=inputs).SerializeToString())
        for name, call in self.before.items():
            if is_named(name, path, run):
                call()
        retries = {True: SYSTEM_RETRIES, False: node.metadata.retries.retries}
        outputs: Literals | None = None
        while outputs is None and run.job is None:
            try:
                outputs = self.attempt(node, path, run, env or {})
            except NodeFailed as failure:
                retries[failure.system] -= 1
                if not failure.recoverable or retries[failure.system] < 0:
                    raise
        if run.job is None:
            return outputs or {}
        self.tasks |= {task.id.name: task for task in run.job.tasks}
        self.workflows |= {workflow.id.name: workflow for workflow in run.job.subworkflows}
        return self.nodes(run.job.nodes, run.job.outputs, inputs, path)

    def attempt(self, node: Node, path: str, run: NodeRun, env: Mapping[str, str]) -> Literals | None:
        """Run a task's pod once. Raises NodeFailed if it fails; returns None if a dynamic task has generated nodes."""
        task, name, number = self.task(run.task), f"{self.execution.name}-{path}", run.attempts
        outputs, raw = f"{path}/data/{number}", f"s3://{BUCKET}/data/{self.execution.name}/{path}"
        args = {
            "{{.input}}": self.uri(f"{path}/data/inputs.pb"),
            "{{.outputPrefix}}": self.uri(outputs),
            "{{.rawOutputDataPrefix}}": f"{raw}/{number}",
            "{{.checkpointOutputPrefix}}": f"{raw}/{number}/_flytecheckpoints",
            "{{.prevCheckpointPrefix}}": f"{raw}/{number - 1}/_flytecheckpoints" if number else '""',
        }
        prefix = []
        uploaded = self.execution.uploaded
        if uploaded and run.task not in self.tasks:  # a dynamic task adds the prefix to the tasks that it generates
            prefix = ["pyflyte-fast-execute", "--additional-distribution", uploaded, "--dest-dir", ".", "--"]
        interrupt = next((value for key, value in self.interrupt.items() if is_named(key, path, run)), None)
        run.attempts += 1
        started = time.monotonic()
        try:
            result = self.flyte.pods.run(
                f"{name}-{number}",
                f"{PROJECT}-{self.flyte.domain}",
                task,
                args,
                {**self.pod_variables(task, number), **env},
                prefix=prefix,
                seconds=node.metadata.timeout.seconds or MAX_SECONDS,
                interrupt=interrupt if number == 0 else None,
            )
        except PodRejected as rejection:
            raise NodeFailed(str(rejection)) from None
        finally:
            run.seconds += time.monotonic() - started
        run.log += result.log
        if result.error:
            raise NodeFailed(result.error)
        if result.code:  # or a signal: without an error file, Flyte takes it for a system error
            last = "\n".join(result.log.strip().splitlines()[-20:])
            raise NodeFailed(f"{path}: exit code {result.code}\n{last}", recoverable=True, system=True)
        files = self.files(outputs)
        # An error counts even next to outputs. Each worker of a job may write one; the earliest is the cause.
        if errors := [self.read(key) for name, key in files.items() if re.fullmatch(r"error.*\.pb", name)]:
            documents = [ErrorDocument.FromString(data).error for data in errors]
            error = min(documents, key=lambda document: document.timestamp.ToNanoseconds())
            recoverable, system = error.kind == ContainerError.RECOVERABLE, error.origin == ExecutionError.SYSTEM
            raise NodeFailed(error.message, recoverable=recoverable, system=system)
        if "futures.pb" in files:
            run.job = DynamicJobSpec.FromString(self.read(files["futures.pb"]))
            return None
        if "outputs.pb" not in files:
            raise NodeFailed("outputs not generated by task execution", recoverable=True, system=True)
        return dict(LiteralMap.FromString(self.read(files["outputs.pb"])).literals)

    def pod_variables(self, task: TaskTemplate, attempt: int) -> dict[str, str]:
        """The variables that Flyte sets in each pod."""
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
        """The URI of a file of this execution."""
        return f"s3://{BUCKET}/metadata/{PROJECT}-{self.flyte.domain}-{self.execution.name}/{path}"

    def write(self, path: str, data: bytes) -> None:
        """Write a file of this execution."""
        key = self.uri(path).removeprefix(f"s3://{BUCKET}/")
        self.flyte.store.put_object(BUCKET, key, io.BytesIO(data), len(data))

    def files(self, path: str) -> dict[str, str]:
        """The keys of the files in a folder of this execution, by file name."""
        prefix = self.uri(path).removeprefix(f"s3://{BUCKET}/") + "/"
        found = [str(entry.object_name) for entry in self.flyte.store.list_objects(BUCKET, prefix)]
        return {key.removeprefix(prefix): key for key in found}

    def read(self, key: str) -> bytes:
        """The content of a file."""
        with self.flyte.store.get_object(BUCKET, key) as response:
            return response.read()


NONE = Literal()
NONE.scalar.none_type.SetInParent()


def holds(condition: BooleanExpression, inputs: Literals) -> bool:
    """Whether a branch condition holds."""
    if condition.HasField("conjunction"):
        both = condition.conjunction
        sides = holds(both.left_expression, inputs), holds(both.right_expression, inputs)
        return all(sides) if both.operator == ConjunctionExpression.AND else any(sides)
    comparison = condition.comparison
    return COMPARE[comparison.operator](operand(comparison.left_value, inputs), operand(comparison.right_value, inputs))


def operand(side: Operand, inputs: Literals) -> Any:
    """One side of a comparison. Propeller compares only primitives."""
    if side.HasField("primitive"):
        return getattr(side.primitive, side.primitive.WhichOneof("value"))
    literal = inputs[side.var] if side.HasField("var") else Literal(scalar=side.scalar)
    if literal.scalar.WhichOneof("value") != "primitive":
        raise NodeFailed(f"only primitives can be compared, and {side.var} is not one")
    return value_of(literal)
