"""The page of an audit: `audit.html`, self-contained, and `shapedpo view`, a local server for audits of any size."""
