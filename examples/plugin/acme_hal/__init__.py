"""Add the platform `acme` and a kernel of the op `linear` to hal."""
