"""Lists what the documentation of public items lacks, by rustdoc's JSON: `docs/items.sh` runs it.

Every item says what it is. Every type, trait and function stands in a compiled example, on its own page, on one that its
type or trait links to, on its module's, or on the crate's; what a trait provides need not. Every function that returns a `Result` has a section `Errors` which says what
of, unless it is one of a trait that does. A feature that brings an item stands at it.
"""

import json
import re
import sys

CRATE = json.load(open(sys.argv[1]))
INDEX = CRATE["index"]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```", re.M | re.S)
missing = []


def item(number):
    return INDEX.get(str(number))


def examples(docs):
    """The code of the compiled examples in `docs`, with the lines that are hidden."""
    found = FENCE.findall(docs or "")
    return "\n".join(code for kind, code in found if not re.search(r"text|ignore|sh$|sql|console", kind))


def returns_result(function):
    output = function["sig"]["output"]
    kind = (output or {}).get("resolved_path") or {}
    return kind.get("path", "").split("::")[-1] == "Result"


def page(it):
    """The examples of a type's or trait's own documentation and of its methods'."""
    inner = next(iter(it["inner"].values()))
    shown = examples(it["docs"])
    below = inner.get("items", []) if "trait" in it["inner"] else []
    for implementation in inner.get("impls", []) if isinstance(inner, dict) else []:
        block = item(implementation)
        if block and block["inner"]["impl"]["trait"] is None:
            below = below + block["inner"]["impl"]["items"]
    return "\n".join([shown] + [examples(item(child)["docs"]) for child in below if item(child)])


def linked(it):
    return "\n".join(page(item(number)) for number in it["links"].values() if item(number))


def check(it, path, shown, is_provided=False):
    docs, name = it["docs"] or "", it["name"]
    kind = next(iter(it["inner"]))
    if not docs.strip():
        missing.append(f"{path}: says nothing")
    shown = "\n".join([shown, examples(docs), linked(it)])
    if kind in ("struct", "enum", "trait") and (page(it) or linked(it)):
        return shown
    if kind in ("function", "struct", "enum", "trait", "macro", "proc_macro", "constant", "type_alias") and not is_provided:
        if not re.search(rf"\b{re.escape(name)}\b", shown):
            missing.append(f"{path}: in no example")
    if kind == "function" and returns_result(it["inner"]["function"]) and not re.search(r"^# Errors", docs, re.M):
        missing.append(f"{path}: does not say which errors")
    return shown


def is_hidden(it):
    return any("hidden" in str(attribute) for attribute in it["attrs"])


def walk(number, path, shown, seen):
    it = item(number)
    if it is None or is_hidden(it):
        return
    kind, inner = next(iter(it["inner"].items()))
    if kind == "use":
        target = item(inner["id"])
        if target is not None and not inner["is_glob"]:
            walk(inner["id"], f"{path}::{inner['name']}", shown, seen)
        return
    if number in seen:
        return
    seen.add(number)
    here = path if it["name"] is None or path.endswith("::" + it["name"]) else f"{path}::{it['name']}"
    if kind == "module":
        below = shown + "\n" + examples(it["docs"])
        if number != CRATE["root"] and not (it["docs"] or "").strip():
            missing.append(f"{here}: says nothing")
        for child in inner["items"]:
            walk(child, here if number != CRATE["root"] else "lockkit", below, seen)
        return
    below = check(it, here, shown)
    if kind in ("struct", "enum", "union"):
        members = list(inner.get("variants", []))
        fields = inner.get("kind")
        if isinstance(fields, dict) and "plain" in fields:
            members += fields["plain"]["fields"]
        for member in members:
            found = item(member)
            if found and not (found["docs"] or "").strip():
                missing.append(f"{here}::{found['name']}: says nothing")
            if found and "variant" in found["inner"]:
                struct = found["inner"]["variant"]["kind"]
                if isinstance(struct, dict) and "struct" in struct:
                    for field in struct["struct"]["fields"]:
                        if not (item(field)["docs"] or "").strip():
                            missing.append(f"{here}::{found['name']}::{item(field)['name']}: says nothing")
        for implementation in inner["impls"]:
            block = item(implementation)
            if block is None or block["inner"]["impl"]["trait"] is not None:
                continue
            own = [item(child) for child in block["inner"]["impl"]["items"]]
            together = below + "\n".join(examples(child["docs"]) for child in own if child)
            for child in own:
                if child and child["visibility"] == "public" and not is_hidden(child):
                    check(child, f"{here}::{child['name']}", together)
    if kind == "trait":
        own = [item(child) for child in inner["items"]]
        together = below + "\n".join(examples(child["docs"]) for child in own if child)
        for child in own:
            function = child["inner"].get("function", {})
            check(child, f"{here}::{child['name']}", together, function.get("has_body", False))


walk(CRATE["root"], "lockkit", "", set())
print("\n".join(missing))
sys.exit(bool(missing))
