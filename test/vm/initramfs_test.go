package vm

import (
	"bytes"
	"testing"
)

func TestRoot(t *testing.T) {
	r := newRoot()
	r.add("/lib64/ld.so", 0o755, nil)
	r.add("/usr/bin/ip", 0o755, nil)
	r.dir("/tests/a/b")
	for _, name := range []string{"usr/lib64/ld.so", "usr/lib64", "usr/bin/ip", "tests", "tests/a/b"} {
		if _, ok := r.files[name]; !ok {
			t.Errorf("no %s", name)
		}
	}
	var archive bytes.Buffer
	if err := r.write(&archive); err != nil || archive.Len()%4 != 0 {
		t.Errorf("%d bytes, %v", archive.Len(), err)
	}
}
