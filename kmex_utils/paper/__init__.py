"""The paper's numbers beside ours: runs, tables, figures, claims, the batch."""
