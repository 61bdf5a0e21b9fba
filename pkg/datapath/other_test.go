package datapath

import (
	"errors"
	"log/slog"
	"testing"
)

// Nobody is contended with before it is known who is there.
func TestYields(t *testing.T) {
	var name string
	var err error
	d := &Datapath{cfg: Config{Services: true, Yield: func() (string, error) { return name, err }, Log: slog.New(slog.DiscardHandler)}}
	for _, c := range []struct {
		what, name string
		err        error
		want       bool
	}{
		{"the first look fails", "", errors.New("interrupted"), true},
		{"nobody is there", "", nil, false},
	} {
		name, err = c.name, c.err
		if got := d.yields(); got != c.want {
			t.Errorf("%s: yields %t, want %t", c.what, got, c.want)
		}
	}
}
