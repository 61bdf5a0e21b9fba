package userspace

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"meshd.dev/pkg/datapath/wireguard/userspace/link"
	"meshd.dev/pkg/datapath/wireguard/userspace/trial"
)

func TestFindOffloads(t *testing.T) {
	none, some, all := trial.Offloads{}, trial.Offloads{Sockets: true}, trial.Offloads{Link: link.TCP | link.UDP, Sockets: true}
	slow, wrong := fmt.Errorf("datagram 1 of 3: %w", os.ErrDeadlineExceeded), errors.New("a packet has a wrong checksum")
	type found struct {
		trial.Offloads
		err error
	}
	for _, c := range []struct {
		name  string
		finds []found // the last again and again
		used  []trial.Offloads
		tries int
		took  time.Duration
	}{
		{"all at once", []found{{all, nil}}, []trial.Offloads{all}, 1, 0},
		{"wrong bytes stay wrong", []found{{some, wrong}}, []trial.Offloads{some}, 1, 0},
		{"a busy machine", []found{{none, slow}, {none, slow}, {all, nil}}, []trial.Offloads{none, all}, 3, 90 * time.Second},
		{"wrong once there is time", []found{{none, slow}, {some, wrong}}, []trial.Offloads{none, some}, 2, 30 * time.Second},
		{"slow and wrong", []found{{none, errors.Join(wrong, slow)}, {some, wrong}}, []trial.Offloads{none, some}, 2, 30 * time.Second},
		{"packets that are lost", []found{{some, slow}}, []trial.Offloads{some}, 1 + retrials, 63 * 30 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var used []trial.Offloads
				tries, began := 0, time.Now()
				try := func() (trial.Offloads, error) {
					f := c.finds[min(tries, len(c.finds)-1)]
					tries++
					return f.Offloads, f.err
				}
				findOffloads(t.Context(), try, func(o trial.Offloads) { used = append(used, o) }, slog.New(slog.DiscardHandler))
				if took := time.Since(began); tries != c.tries || took != c.took || !slices.Equal(used, c.used) {
					t.Errorf("%d tries in %s, used %+v; want %d in %s, %+v", tries, took, used, c.tries, c.took, c.used)
				}
			})
		})
	}
	t.Run("the end", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			go func() { time.Sleep(time.Second); cancel() }()
			began := time.Now()
			findOffloads(ctx, func() (trial.Offloads, error) { return none, slow }, func(trial.Offloads) {}, slog.New(slog.DiscardHandler))
			if took := time.Since(began); took != time.Second {
				t.Errorf("it went on for %s", took)
			}
		})
	})
}
