"""The selective scan: one public function, one file per backend."""
