# SPDX-License-Identifier: Apache-2.0
"""Make models that others wrote fast, in place and reversibly.

`patch` walks a model, finds modules that a rule knows, and gives each a class whose forward runs on `vidkernels.ops`.
No parameter, name or buffer changes. Nothing is patched at import, and nothing outside the model handed in.
"""

from __future__ import annotations

import vidkernels.patching.rules  # noqa: F401  (first: importing a subpackage binds its name, then `rules()` takes it)
from vidkernels.patching._api import explain, patch, patched, status, unpatch, unpatched
from vidkernels.patching._match import digest
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._report import Entry, PatchReport, Status
from vidkernels.patching._rule import Rule, RuleTable, register_rule, rules
from vidkernels.patching._verify import Numerics

__all__ = [
    "Entry",
    "Fused",
    "Numerics",
    "PatchReport",
    "Rule",
    "RuleTable",
    "Status",
    "digest",
    "explain",
    "patch",
    "patched",
    "register_rule",
    "rules",
    "status",
    "unpatch",
    "unpatched",
]
