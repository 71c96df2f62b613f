"""Files that want something: to run code, to crash a kernel, to fill the memory, to hang. All must be refused.

Every one is a change of a good file with sums that are right, so that nothing but the meaning can give it away.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from typing import Any

from archives import Entries, changed

from fxsparse.saving import safety

Change = Callable[[Entries, str], Entries]


class _Pickled:
    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (self.code,)


def _program(change: Callable[[Any, str], Any]) -> Change:
    return lambda entries, code: changed(entries, safety.PROGRAM, lambda values: change(values, code))


def _graph(change: Callable[[Any, str], Any]) -> Change:
    return _program(lambda values, code: change(values["graph_module"]["graph"], code))


def _node(change: Callable[[Any, str], Any]) -> Change:
    """Change the last node that is no convolution."""
    return _graph(lambda graph, code: change(graph["nodes"][-1], code))


def _weight(change: Callable[[Any], Any]) -> Change:
    return lambda entries, _: changed(
        entries, safety.WEIGHTS_LIST, lambda values: change(values["config"]["head.weight"])
    )


def _state(change: Callable[[Any], Any]) -> Change:
    return lambda entries, _: changed(entries, safety.STATE, change)


def _target(target: str) -> Change:
    return _node(lambda node, _: node.update(target=target))


def _expression(text: str) -> Change:
    """Put a text where torch evaluates a size."""
    return _graph(
        lambda graph, code: graph["tensor_values"]["x"]["sizes"].__setitem__(
            0, {"as_expr": {"expr_str": text.replace("CODE", code), "hint": {"as_int": 2}}}
        )
    )


def _pickled_weight(entries: Entries, code: str) -> Entries:
    changed_entries = changed(
        entries, safety.WEIGHTS_LIST, lambda values: values["config"]["head.weight"].update(use_pickle=True)
    )
    path = json.loads(entries[safety.WEIGHTS_LIST])["config"]["head.weight"]["path_name"]
    return {**changed_entries, f"data/weights/{path}": pickle.dumps(_Pickled(code))}


def _pickled_constant(prefix: str) -> Change:
    def change(entries: Entries, code: str) -> Entries:
        meta = {"path_name": f"{prefix}0", "is_param": False, "use_pickle": True, "tensor_meta": None}
        listed = changed(entries, safety.CONSTANTS_LIST, lambda values: values["config"].update(thing=meta))
        return {**listed, f"data/constants/{prefix}0": pickle.dumps(_Pickled(code))}

    return change


def _spec(which: str, spec: Any) -> Change:
    def change(values: Any, code: str) -> None:
        text = json.dumps([1, spec]).replace("CODE", code)
        values["graph_module"]["module_call_graph"][0]["signature"][which] = text

    return _program(change)


def _leaf() -> dict[str, Any]:
    return {"type": None, "context": None, "children_spec": []}


def _renamed(entries: Entries, code: str) -> Entries:
    """Rename the program's input to a piece of Python, everywhere."""
    text = entries[safety.PROGRAM].decode().replace('"x"', json.dumps(f"x):\n    {code}\n#"))
    return {**entries, safety.PROGRAM: text.encode()}


def _parameter(name: str) -> Change:
    def change(entries: Entries, code: str) -> Entries:
        new = json.dumps(name.replace("CODE", code))
        touched = (safety.PROGRAM, safety.WEIGHTS_LIST)
        return {**entries, **{e: entries[e].decode().replace('"head.weight"', new).encode() for e in touched}}

    return change


def _table(change: Callable[[Any, str], None]) -> Change:
    """Change the program around the tables of the first convolution, whose placeholder is given."""
    return _program(lambda values, _: change(values["graph_module"], "b_first_weight_columns"))


def _reads_table(module: Any, table: str) -> None:
    module["graph"]["nodes"][-1]["inputs"][-1]["arg"] = {"as_tensor": {"name": table}}


def _writes_table(module: Any, table: str) -> None:
    mutation = {"arg": {"name": table}, "buffer_name": "first.weight_columns"}
    module["signature"]["output_specs"].insert(0, {"buffer_mutation": mutation})


def _shares_table(entries: Entries, _: str) -> Entries:
    def change(values: Any) -> None:
        config = values["config"]
        config["head.weight"]["path_name"] = config["first.weight_rows"]["path_name"]
        config["head.weight"]["tensor_meta"].update(dtype=5)
        config["head.weight"]["tensor_meta"]["requires_grad"] = False

    dropped = json.loads(entries[safety.WEIGHTS_LIST])["config"]["head.weight"]["path_name"]
    rest = {name: content for name, content in entries.items() if name != f"data/weights/{dropped}"}
    return changed(rest, safety.WEIGHTS_LIST, change)


def _metas(**fields: Any) -> Change:
    return _weight(lambda config: config["tensor_meta"].update(fields))


def _ints(*values: int) -> list[dict[str, int]]:
    return [{"as_int": value} for value in values]


def _empty_payload(entries: Entries, _: str) -> Entries:
    """Let torch.zeros make a tensor of the listed size, as it does for a file without bytes."""
    path = json.loads(entries[safety.WEIGHTS_LIST])["config"]["head.weight"]["path_name"]
    return _metas(sizes=_ints(1 << 40, 16))({**entries, f"data/weights/{path}": b""}, "")


def _first_sparse(change: Callable[[Any], None]) -> Change:
    """Change the site of the first convolution."""
    return _state(lambda state: change(next(iter(state["sites"].values()))))


def _added(name: str, content: bytes | None = None) -> Change:
    return lambda entries, code: {**entries, name: pickle.dumps(_Pickled(code)) if content is None else content}


def _text(entry: str, text: bytes) -> Change:
    return lambda entries, _: {**entries, entry: text}


def _panels(entries: Entries, _: str) -> Entries:
    """Point the first panel far behind its columns."""
    config = json.loads(entries[safety.WEIGHTS_LIST])["config"]["first.weight_panels"]
    name = f"data/weights/{config['path_name']}"
    return {**entries, name: struct.pack("<q", 1 << 40) + entries[name][8:]}


def _booleans(entries: Entries, _: str) -> Entries:
    """Write another byte than 0 and 1 into a mask."""
    config = json.loads(entries[safety.WEIGHTS_LIST])["config"]["first.weight_mask"]
    name = f"data/weights/{config['path_name']}"
    return {**entries, name: b"\x02" + entries[name][1:]}


HOSTILE: dict[str, Change] = {
    "pickled weight": _pickled_weight,
    "pickled constant": _pickled_constant("tensor_"),
    "script object": _pickled_constant("custom_obj_"),
    "opaque object": _pickled_constant("opaque_obj_"),
    "sample inputs": lambda entries, code: {**entries, "data/sample_inputs/model.pt": pickle.dumps(_Pickled(code))},
    "old weights file": _added("data/weights/model.pt"),
    "old constants file": _added("data/constants/model.pt"),
    "old archive": _added("serialized_state_dict.pt"),
    "old version entry": _added("version", b"8.1"),
    "compiled code": _added("data/aotinductor/model/code.so", b"\x7fELF"),
    "second program": _added("models/other.json", b"{}"),
    "size as code": _expression("exec('CODE')"),
    "size with code in an assumption": _expression("Symbol('s0', integer=exec('CODE'))"),
    "size with code in a name": _expression("Symbol(exec('CODE'))"),
    "size by attribute": _expression("Symbol.__init__.__globals__"),
    "size by comprehension": _expression("Add(*[exec('CODE') for _ in (1,)])"),
    "size as lambda": _expression("(lambda: exec('CODE'))()"),
    "size of a huge power": _expression("Pow(Pow(Integer(9), Integer(8)), Pow(Integer(9), Integer(9)))"),
    "size of nested powers": _expression("Pow(" * 30 + "Integer(9)" + ", Integer(8))" * 30),
    "size nested deeply": _expression("Add(" * 2000 + "Integer(1)" + ")" * 2000),
    "symbol with a huge number": _program(
        lambda values, _: values["range_constraints"].update({"u99999999999": {"min_val": 0, "max_val": 9}})
    ),
    **{
        f"calls {target}": _target(target)
        for target in (
            "torch.hub.load",
            "torch.load",
            "torch.os.system",
            "torch.utils.cpp_extension.load",
            "torch.ops.aten.from_file.default",
            "torch.ops.aten._print.default",
            "torch.ops.aten.set_.source_Storage",
            "torch.ops.aten.resize_.default",
            "torch.ops.aten.add.out",
            "torch.ops.aten._reshape_alias.default",
            "torch.ops.load_library",
            "torch.ops.fxsparse.unpack.default",
            "torch.ops.higher_order.cond",
            "torch.ops.higher_order.triton_kernel_wrapper_functional",
            "_operator.methodcaller",
            "_operator.call",
            "_operator.attrgetter",
            "math.factorial",
            "#extension:operator",
            "os.system",
        )
    },
    "operator as argument": _node(lambda node, _: node["inputs"][0].update(arg={"as_operator": "torch.os.system"})),
    "object as argument": _node(
        lambda node, _: node["inputs"][0].update(arg={"as_custom_obj": {"name": "x", "class_fqn": "os.system"}})
    ),
    "graph as argument": _node(lambda node, _: node["inputs"][0].update(arg={"as_graph": {"name": "x", "graph": {}}})),
    "objects": _graph(lambda graph, _: graph.update(custom_obj_values={"x": {"name": "x", "class_fqn": "os.system"}})),
    "guards": _program(lambda values, code: values.update(guards_code=[f"exec({code!r})"])),
    "metadata of a node": _node(lambda node, _: node.update(metadata={"source_fn_stack": "x,torch.os.system"})),
    "metadata of the graph": _program(lambda values, _: values["graph_module"].update(metadata={"custom": "{}"})),
    "unknown verifier": _program(lambda values, _: values.update(verifiers=["os.system"])),
    "other schema": _program(lambda values, _: values["schema_version"].update(major=9)),
    "code as the name of an input": _renamed,
    "code as the name of a node": _node(lambda node, code: node.update(name=f"y\n    {code}\n    z")),
    "code as the name of a result": _node(
        lambda node, code: node["outputs"][0].update(as_tensor={"name": f"y = 0\n    {code}\n    z"})
    ),
    "code as an argument's name": _program(
        lambda values, code: values["graph_module"]["module_call_graph"][0]["signature"].update(
            forward_arg_names=[f"x=exec({code!r})"]
        )
    ),
    "code as the name of a parameter": _parameter('head["), exec("CODE"), ("'),
    "parameter of a class": _parameter("__class__"),
    "parameter of parameters": _parameter("head.__dict__"),
    "enum in the inputs": _spec(
        "in_spec",
        {
            "type": "builtins.list",
            "context": '{"__enum__": true, "fqn": "os:system", "name": "x"}',
            "children_spec": [],
        },
    ),
    "factory in the outputs": _spec(
        "out_spec",
        {
            "type": "collections.defaultdict",
            "context": {"default_factory_module": "os", "default_factory_name": "system", "dict_context": []},
            "children_spec": [],
        },
    ),
    "code as a keyword of the inputs": _spec(
        "in_spec",
        {
            "type": "builtins.tuple",
            "context": "null",
            "children_spec": [
                {"type": "builtins.tuple", "context": "null", "children_spec": []},
                {"type": "builtins.dict", "context": '["x=exec(1)"]', "children_spec": [_leaf()]},
            ],
        },
    ),
    "huge size": _metas(sizes=_ints(1 << 40, 1 << 40)),
    "huge size by stride 0": _metas(sizes=_ints(1 << 40, 16), strides=_ints(0, 1)),
    "huge size without bytes": _empty_payload,
    "negative size": _metas(sizes=_ints(-4, 16)),
    "negative stride": _metas(strides=_ints(-16, 1)),
    "huge stride": _metas(strides=_ints(1 << 62, 1)),
    "offset behind the end": _metas(storage_offset={"as_int": 1 << 40}),
    "negative offset": _metas(storage_offset={"as_int": -64}),
    "fewer strides": _metas(strides=_ints(1)),
    "size of a symbol": _metas(sizes=[{"as_expr": {"expr_str": "Symbol('s0')", "hint": None}}, {"as_int": 16}]),
    "unknown dtype": _metas(dtype=63),
    "wider dtype": _metas(dtype=8),
    "integers with gradients": _metas(dtype=4),
    "sparse layout": _metas(layout=1),
    "weight in another folder": _weight(
        lambda config: config.update(path_name="../constants/model_constants_config.json")
    ),
    "weight without a file": _weight(lambda config: config.update(path_name="weight_99999")),
    "table that is read": _table(_reads_table),
    "table that is written": _table(_writes_table),
    "table that shares memory": _shares_table,
    "table that points behind": _panels,
    "site of a huge weight": _first_sparse(lambda site: site.update(weight_shape=[1 << 40, 3, 3, 3])),
    "site with 0 groups": _first_sparse(lambda site: site.update(groups=0)),
    "site with other tables": _first_sparse(lambda site: site.update(packed="second.weight")),
    "site without tables": _first_sparse(lambda site: site.update(packed="nothing")),
    "site with another regrouping": _first_sparse(lambda site: site.update(regrouping=1 << 40)),
    "site with a huge padding": _first_sparse(lambda site: site.update(padding=[-1, 0, 0, 0])),
    **{
        f"attribute '{name}'": _state(lambda state, name=name: state["attributes"].update({name: {}}))
        for name in ("__class__", "_buffers", "_modules", "_parameters", "forward", "graph", "_graph", "x y", "meta")
    },
    "booleans that are neither": _booleans,
    "unknown device": _state(lambda state: state.update(device="cuda:99999")),
    "code as the class": _state(lambda state: state.update({"class": "A:\n    pass\nimport os\nclass B"})),
    "inputs of a huge shape": _state(lambda state: state.update(inputs=[{"shape": [1 << 62] * 8, "dtype": "float32"}])),
    "newer manifest": lambda entries, _: changed(entries, safety.MANIFEST, lambda values: values.update(version=2)),
    "newer plan": lambda entries, _: changed(entries, safety.PLAN, lambda values: values.update(version=10**9)),
    "foreign manifest": lambda entries, _: changed(entries, safety.MANIFEST, lambda values: values.update(format="x")),
    "archive of another version": _text("archive_version", b"1"),
    "other byte order": _text("byteorder", b"big"),
    "deep JSON": _text(safety.STATE, b"[" * 200_000 + b"]" * 200_000),
    "JSON with a field twice": _text(safety.REPORT, b'{"rows": [], "rows": []}'),
    "JSON with NaN": _text(safety.REPORT, b"[NaN]"),
    "JSON with a huge integer": _text(safety.REPORT, b"[" + b"9" * 100_000 + b"]"),
    "JSON that is no text": _text(safety.STATE, b'"\xff\xfe"'),
    "regroupings that are none": _text(safety.REGROUPINGS, b"\xff" * 64),
}
