"""Check `models/model.json`, the program, before torch reads it.

torch's loader looks names up, evaluates sizes, imports modules and pastes names into Python source. So every field is
read here by a reader that takes what `fxsparse.save` writes and nothing else; a field that this version does not know
is refused as well, since nobody has looked at what torch does with it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from fxsparse import json_values
from fxsparse.json_values import Wrong
from fxsparse.saving import expression_check
from fxsparse.saving import program_values as values_of
from fxsparse.saving.safe_operators import SPARSE_CONV, is_safe

SCHEMA_MAJOR = 8
TABLES = ("columns", "panels", "rows")


class Program:
    """What the rest of the check asks about a program.

    Attributes:
        targets: by graph input, the name of the parameter, buffer or constant that it is.
        tables: names of the tensors that sparse convolutions read as tables.
        others: names of all tensors that anything else in the program reads, writes or returns.
    """

    def __init__(self, values: Any) -> None:
        """Read a program.

        Args:
            values: the JSON values of `models/model.json`.

        Raises:
            Wrong: something in it is not what `fxsparse.save` writes.
        """
        self.targets: dict[str, str] = {}
        self._roles: defaultdict[str, set[str]] = defaultdict(set)  # how the program reads a name
        program = values_of.fields_of(
            values,
            "the program",
            ("graph_module", "opset_version", "range_constraints", "schema_version"),
            ("verifiers", "torch_version", "guards_code"),
        )
        version = values_of.fields_of(program["schema_version"], "schema_version", ("major", "minor"))
        if version["major"] != SCHEMA_MAJOR:
            raise Wrong(version["major"], "schema_version.major", f"{SCHEMA_MAJOR} (another version of torch wrote it)")
        json_values.integer(version["minor"], "schema_version.minor")
        for name, number in json_values.by_name(json_values.integer)(program["opset_version"], "opset_version").items():
            values_of.identifier(name, "opset_version")
            json_values.integer(number, f"opset_version.{name}")
        json_values.by_name(values_of.range_of)(program["range_constraints"], "range_constraints")
        for symbol in program["range_constraints"]:
            if not expression_check.SYMBOL.fullmatch(symbol):
                raise Wrong(symbol, "range_constraints", "a symbol such as s0")
        json_values.tuple_of(json_values.one_of(("TRAINING", "ATEN")))(program.get("verifiers", []), "verifiers")
        json_values.text(program.get("torch_version", ""), "torch_version")
        values_of.empty(program.get("guards_code", []), "guards_code")
        self._read_module(program["graph_module"])
        self.tables = frozenset(self.targets[name] for name, roles in self._roles.items() if roles & set(TABLES))
        self.others = frozenset(
            self.targets[name] for name, roles in self._roles.items() if roles - set(TABLES) and name in self.targets
        )

    def _read_module(self, values: Any) -> None:
        module = values_of.fields_of(
            values,
            "graph_module",
            ("graph", "signature", "module_call_graph"),
            ("metadata", "treespec_namedtuple_fields"),
        )
        values_of.empty(module.get("metadata", {}), "graph_module.metadata")
        values_of.empty(module.get("treespec_namedtuple_fields", {}), "graph_module.treespec_namedtuple_fields")
        signature = values_of.fields_of(module["signature"], "signature", ("input_specs", "output_specs"))
        for i, spec in enumerate(values_of.list_of(signature["input_specs"], "input_specs")):
            self._read_input(*values_of.tagged(spec, f"input_specs[{i}]"))
        for i, spec in enumerate(values_of.list_of(signature["output_specs"], "output_specs")):
            self._read_output(*values_of.tagged(spec, f"output_specs[{i}]"))
        self._read_graph(module["graph"], "graph")
        (entry,) = values_of.list_of(module["module_call_graph"], "module_call_graph", length=1)
        fields = values_of.fields_of(entry, "module_call_graph[0]", ("fqn", "signature"))
        json_values.one_of(("",))(fields["fqn"], "module_call_graph[0].fqn")
        call = values_of.fields_of(
            fields["signature"],
            "module_call_graph[0].signature",
            ("inputs", "outputs", "in_spec", "out_spec"),
            ("forward_arg_names",),
        )
        values_of.empty(call["inputs"], "module_call_graph[0].signature.inputs")
        values_of.empty(call["outputs"], "module_call_graph[0].signature.outputs")
        for spec in ("in_spec", "out_spec"):
            values_of.treespec(call[spec], spec)
        json_values.optional(values_of.identifiers)(call.get("forward_arg_names"), "forward_arg_names")

    def _read_input(self, kind: str, value: Any, place: str) -> None:
        if kind == "user_input":
            self._read_argument(values_of.fields_of(value, place, ("arg",))["arg"], f"{place}.arg", "signature")
            return
        if kind == "constant_input":
            fields = values_of.fields_of(value, place, ("name", "value"))
            values_of.identifier(fields["name"], f"{place}.name")
            tag, constant, inner = values_of.tagged(fields["value"], f"{place}.value")
            values_of.by_tag(values_of.CONSTANTS, tag, inner)(constant, inner)
            return
        if kind not in ("parameter", "buffer", "tensor_constant"):
            raise Wrong(kind, place, "a user input, a parameter, a buffer or a constant")
        fields = values_of.fields_of(value, place, ("arg", f"{kind}_name"), ("persistent",))
        if "persistent" in fields:
            values_of.boolean(fields["persistent"], f"{place}.persistent")
        name = values_of.name_record(fields["arg"], f"{place}.arg")
        if name in self.targets:
            raise Wrong(name, place, "a name that no other input has")
        self.targets[name] = values_of.tensor_name(fields[f"{kind}_name"], f"{place}.{kind}_name")

    def _read_output(self, kind: str, value: Any, place: str) -> None:
        if kind == "user_output":
            self._read_argument(values_of.fields_of(value, place, ("arg",))["arg"], f"{place}.arg", "output")
            return
        what = {
            "buffer_mutation": "buffer_name",
            "parameter_mutation": "parameter_name",
            "user_input_mutation": "user_input_name",
        }
        if kind not in what:
            raise Wrong(kind, place, "an output of the user or a mutation")
        fields = values_of.fields_of(value, place, ("arg", what[kind]))
        self._use(values_of.name_record(fields["arg"], f"{place}.arg"), "output")
        target = values_of.tensor_name(fields[what[kind]], f"{place}.{what[kind]}")
        for name in (name for name, other in self.targets.items() if other == target):
            self._use(name, "mutation")

    def _read_graph(self, values: Any, place: str) -> None:
        graph = values_of.fields_of(
            values,
            place,
            ("inputs", "outputs", "nodes", "tensor_values", "sym_int_values", "sym_bool_values"),
            ("is_single_tensor_return", "custom_obj_values", "sym_float_values"),
        )
        values_of.boolean(graph.get("is_single_tensor_return", False), f"{place}.is_single_tensor_return")
        values_of.empty(graph.get("custom_obj_values", {}), f"{place}.custom_obj_values")
        for field, read in (
            ("tensor_values", values_of.tensor_meta),
            ("sym_int_values", values_of.size),
            ("sym_bool_values", values_of.condition),
            ("sym_float_values", values_of.scalar),
        ):
            by_name = json_values.by_name(read)(graph.get(field, {}), f"{place}.{field}")
            values_of.identifiers(list(by_name), f"{place}.{field}")
        for i, argument in enumerate(values_of.list_of(graph["inputs"], f"{place}.inputs")):
            self._read_argument(argument, f"{place}.inputs[{i}]", "input")
        for i, node in enumerate(values_of.list_of(graph["nodes"], f"{place}.nodes")):
            self._read_node(node, f"{place}.nodes[{i}]")
        for i, argument in enumerate(values_of.list_of(graph["outputs"], f"{place}.outputs")):
            self._read_argument(argument, f"{place}.outputs[{i}]", "output")

    def _read_node(self, values: Any, place: str) -> None:
        node = values_of.fields_of(
            values, place, ("target", "inputs", "outputs", "metadata"), ("is_hop_single_tensor_return", "name")
        )
        target = json_values.text(node["target"], f"{place}.target")
        if not is_safe(target):
            raise Wrong(target, f"{place}.target", "an operator that fxsparse knows to be safe to load")
        values_of.empty(node["metadata"], f"{place}.metadata")
        json_values.optional(values_of.boolean)(
            node.get("is_hop_single_tensor_return"), f"{place}.is_hop_single_tensor_return"
        )
        json_values.optional(values_of.identifier)(node.get("name"), f"{place}.name")
        for i, item in enumerate(values_of.list_of(node["inputs"], f"{place}.inputs")):
            here = f"{place}.inputs[{i}]"
            named = values_of.fields_of(item, here, ("name", "arg"), ("kind",))
            name = json_values.text(named["name"], f"{here}.name")
            json_values.optional(values_of.up_to(2))(named.get("kind"), f"{here}.kind")
            is_table = target == SPARSE_CONV and name in TABLES
            if is_table and values_of.tagged(named["arg"], f"{here}.arg")[0] != "as_tensor":
                raise Wrong(named["arg"], f"{here}.arg", "a tensor")
            self._read_argument(named["arg"], f"{here}.arg", name if is_table else "value")
        for i, output in enumerate(values_of.list_of(node["outputs"], f"{place}.outputs")):
            self._read_argument(output, f"{place}.outputs[{i}]", "result")

    def _read_argument(self, values: Any, place: str, role: str) -> None:
        """Read an argument; note the tensors that it names under the role that they have there."""
        tag, value, here = values_of.tagged(values, place)
        found = values_of.by_tag(values_of.ARGUMENTS, tag, here)(value, here)
        for name in values_of.flat(found) if tag in values_of.OF_TENSORS else ():
            self._use(name, role, place)

    def _use(self, name: str, role: str, place: str = "") -> None:
        if role in TABLES and name not in self.targets:
            raise Wrong(name, place, "a buffer of the model: tables may not be computed")
        if role not in ("input", "signature"):
            self._roles[name].add(role)
