"""A viewer in the browser, on this computer only; needs the extra ``viewer``."""
