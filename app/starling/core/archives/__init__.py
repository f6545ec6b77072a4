"""Archives that strangers wrote: read with limits, and never unpacked where a name leads elsewhere."""
