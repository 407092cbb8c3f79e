"""How far training would move what an audit found.

[`run`] is where to begin: [`~run.predict`] and what it returns. [`effects`] reads off a harvest how chosen and rejected completions differ, under the
[`conditions`] too; [`reward`] is what these differences imply and what that moves; [`estimation`] makes changes with intervals of it, with
conditions trusted as far as [`shrinkage`] says.
"""
