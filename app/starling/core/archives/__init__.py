"""Read untrusted archives with limits; no member is unpacked outside its folder."""
