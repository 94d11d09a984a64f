"""Flyte's literals, and what propeller does with them: attribute access and cache keys."""

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
    """The literal for an input value, as given on a command line or in an execution file."""
    literal = Literal()
    if kind.HasField("collection_type"):
        literal.collection.SetInParent()
        literal.collection.literals.extend(literal_of(item, kind.collection_type) for item in value)
    elif kind.simple == SimpleType.STRUCT:
        literal.scalar.binary.value, literal.scalar.binary.tag = msgpack.packb(value), "msgpack"
    else:
        field = {SimpleType.STRING: "string_value", SimpleType.INTEGER: "integer", SimpleType.FLOAT: "float_value",
                 SimpleType.BOOLEAN: "boolean"}[kind.simple]  # fmt: skip
        setattr(literal.scalar.primitive, field, value)
    return literal


def value_of(literal: Literal) -> Any:
    """The value of a literal."""
    kind = literal.WhichOneof("value")
    if kind == "collection":
        return [value_of(item) for item in literal.collection.literals]
    if kind == "map":
        return {key: value_of(item) for key, item in literal.map.literals.items()}
    scalar = literal.scalar.WhichOneof("value")
    if scalar == "primitive":
        primitive = literal.scalar.primitive
        return getattr(primitive, primitive.WhichOneof("value"))
    if scalar == "binary":
        return msgpack.unpackb(literal.scalar.binary.value, strict_map_key=False)
    if scalar == "union":
        return value_of(literal.scalar.union.value)
    return None if scalar == "none_type" else getattr(literal.scalar, scalar)


def attribute(literal: Literal, path: list[Any], rotation: int) -> Literal:
    """Part of a literal. Msgpack is decoded, and encoded again with its map keys in another order.

    Go iterates over a map in random order. Here the keys are rotated by one more place in each execution, so that
    consecutive executions encode a map differently.
    """
    keys = [getattr(part, part.WhichOneof("value")) for part in path]
    while keys and (kind := literal.WhichOneof("value")) != "scalar":
        literal = literal.map.literals[keys.pop(0)] if kind == "map" else literal.collection.literals[keys.pop(0)]
    if not keys:
        return literal
    assert literal.scalar.binary.tag == "msgpack", f"attributes {keys} of {literal}"
    value = msgpack.unpackb(literal.scalar.binary.value, strict_map_key=False)
    for key in keys:
        value = value[key]
    found = Literal()  # without the hash of the whole
    found.scalar.binary.value, found.scalar.binary.tag = msgpack.packb(rotated(value, rotation)), "msgpack"
    return found


def rotated(value: Any, places: int) -> Any:
    """A value in which the keys of each map are rotated."""
    if isinstance(value, list):
        return [rotated(item, places) for item in value]
    if not isinstance(value, dict) or not value:
        return value
    keys = list(value)
    places %= len(keys)
    return {key: rotated(value[key], places) for key in keys[places:] + keys[:places]}


def is_error(kind: LiteralType) -> bool:
    """Whether a type is an error, or a union with one."""
    return kind.simple == SimpleType.ERROR or any(is_error(variant) for variant in kind.union_type.variants)


def error_of(message: str, node: str, kind: LiteralType) -> Literal:
    """The error that a failure node gets."""
    literal = Literal()
    if kind.HasField("union_type"):
        variant = next(variant for variant in kind.union_type.variants if is_error(variant))
        literal.scalar.union.value.CopyFrom(error_of(message, node, variant))
        literal.scalar.union.type.CopyFrom(variant)
    else:
        literal.scalar.error.message, literal.scalar.error.failed_node_id = message, node
    return literal


def cache_key(task: TaskTemplate, inputs: Literals) -> str:
    """The key of a task's outputs in Flyte's catalog."""
    ignored = set(task.metadata.cache_ignore_input_vars)
    parts = [task.id.name.encode(), task.metadata.discovery_version.encode()]
    parts.append(task.interface.SerializeToString(deterministic=True))
    parts += itertools.chain.from_iterable(
        (key.encode(), cache_identity(inputs[key])) for key in sorted(set(inputs) - ignored)
    )
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def cache_identity(literal: Literal) -> bytes:
    """What the cache compares of a literal: its hash if it has one, otherwise its bytes."""
    if literal.hash:
        return b"hash " + literal.hash.encode()
    if literal.HasField("collection"):
        return b"list " + b"".join(
            hashlib.sha256(cache_identity(item)).digest() for item in literal.collection.literals
        )
    if literal.HasField("map"):
        found = sorted(literal.map.literals.items())
        return b"map " + b"".join(hashlib.sha256(key.encode()).digest() + hashlib.sha256(cache_identity(item)).digest()
                                  for key, item in found)  # fmt: skip
    return literal.SerializeToString(deterministic=True)
