"""One file per op: the public function, its fake, autograd and autocast, and the choice of backend."""
