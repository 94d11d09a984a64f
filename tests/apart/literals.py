"""Flyte's values, and what propeller does with them: attributes of them, and the keys of its cache."""

import hashlib
import itertools
from collections.abc import Mapping
from typing import Any

import msgpack
from flyteidl.core.literals_pb2 import Literal
from flyteidl.core.tasks_pb2 import TaskTemplate
from flyteidl.core.types_pb2 import LiteralType, SimpleType

Literals = Mapping[str, Literal]


def literal_of(value: Any, kind: LiteralType) -> Literal:
    """A value of a command line or of an execution's file, as Flyte holds it."""
    literal = Literal()
    if kind.HasField("collection_type"):
        literal.collection.SetInParent()
        literal.collection.literals.extend(literal_of(one, kind.collection_type) for one in value)
    elif kind.simple == SimpleType.STRUCT:
        literal.scalar.binary.value, literal.scalar.binary.tag = msgpack.packb(value), "msgpack"
    else:
        field = {SimpleType.STRING: "string_value", SimpleType.INTEGER: "integer", SimpleType.FLOAT: "float_value",
                 SimpleType.BOOLEAN: "boolean"}[kind.simple]  # fmt: skip
        setattr(literal.scalar.primitive, field, value)
    return literal


def value_of(literal: Literal) -> Any:
    """What a literal holds."""
    kind = literal.WhichOneof("value")
    if kind == "collection":
        return [value_of(one) for one in literal.collection.literals]
    if kind == "map":
        return {key: value_of(one) for key, one in literal.map.literals.items()}
    scalar = literal.scalar.WhichOneof("value")
    if scalar == "primitive":
        primitive = literal.scalar.primitive
        return getattr(primitive, primitive.WhichOneof("value"))
    if scalar == "binary":
        return msgpack.unpackb(literal.scalar.binary.value, strict_map_key=False)
    if scalar == "union":
        return value_of(literal.scalar.union.value)
    return None if scalar == "none_type" else getattr(literal.scalar, scalar)


def attribute(literal: Literal, path: list[Any], turn: int) -> Literal:
    """A part of a literal. What is in msgpack is decoded and encoded anew, with its keys in another order.

    Go's maps have no order: each time is another. Here the keys are turned by one place with each execution (`turn`
    counts them), so that no two executions in a row encode alike.
    """
    keys = [getattr(one, one.WhichOneof("value")) for one in path]
    while keys and (kind := literal.WhichOneof("value")) != "scalar":
        literal = literal.map.literals[keys.pop(0)] if kind == "map" else literal.collection.literals[keys.pop(0)]
    if not keys:
        return literal
    assert literal.scalar.binary.tag == "msgpack", f"attributes {keys} of {literal}"
    value = msgpack.unpackb(literal.scalar.binary.value, strict_map_key=False)
    for key in keys:
        value = value[key]
    found = Literal()  # without the hash of what it is part of
    found.scalar.binary.value, found.scalar.binary.tag = msgpack.packb(turned(value, turn)), "msgpack"
    return found


def turned(value: Any, places: int) -> Any:
    """A value with the keys of each of its maps in another order."""
    if isinstance(value, list):
        return [turned(one, places) for one in value]
    if not isinstance(value, dict) or not value:
        return value
    keys = list(value)
    places %= len(keys)
    return {key: turned(value[key], places) for key in keys[places:] + keys[:places]}


def is_error(kind: LiteralType) -> bool:
    """Whether a type is that of an error, or may be one."""
    return kind.simple == SimpleType.ERROR or any(is_error(one) for one in kind.union_type.variants)


def error_of(message: str, node: str, kind: LiteralType) -> Literal:
    """What a failure node gets for an error."""
    literal = Literal()
    if kind.HasField("union_type"):
        own = next(one for one in kind.union_type.variants if is_error(one))
        literal.scalar.union.value.CopyFrom(error_of(message, node, own))
        literal.scalar.union.type.CopyFrom(own)
    else:
        literal.scalar.error.message, literal.scalar.error.failed_node_id = message, node
    return literal


def cache_key(task: TaskTemplate, inputs: Literals) -> str:
    """What Flyte's catalog finds a task's outputs by."""
    ignored = set(task.metadata.cache_ignore_input_vars)
    parts = [task.id.name.encode(), task.metadata.discovery_version.encode()]
    parts.append(task.interface.SerializeToString(deterministic=True))
    parts += itertools.chain.from_iterable(
        (key.encode(), essence(inputs[key])) for key in sorted(set(inputs) - ignored)
    )
    return hashlib.sha256(b"\0".join(hashlib.sha256(one).digest() for one in parts)).hexdigest()


def essence(literal: Literal) -> bytes:
    """What a literal is to the cache: its hash where it has one, else its bytes."""
    if literal.hash:
        return b"hash " + literal.hash.encode()
    if literal.HasField("collection"):
        return b"list " + b"".join(hashlib.sha256(essence(one)).digest() for one in literal.collection.literals)
    if literal.HasField("map"):
        found = sorted(literal.map.literals.items())
        return b"map " + b"".join(hashlib.sha256(key.encode()).digest() + hashlib.sha256(essence(one)).digest()
                                  for key, one in found)  # fmt: skip
    return literal.SerializeToString(deterministic=True)
