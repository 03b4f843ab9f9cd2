"""All families of public weights; to add one, write its file and name it here."""

from vit22b_transfer.weights import mapping

FAMILIES: tuple[mapping.Family, ...] = ()
