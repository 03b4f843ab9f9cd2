"""Results as pages and tables: one self-contained HTML file each, no request made."""
