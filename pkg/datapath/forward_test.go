package datapath

import (
	"strings"
	"testing"

	"meshd.dev/pkg/datapath/firewall"
)

func TestPassing(t *testing.T) {
	var p passing
	for _, c := range []struct {
		name string
		now  firewall.Passage
		lost uint64
	}{
		{"counts of before meshd started say nothing", firewall.Passage{Began: 100, Passed: 10}, 0},
		{"nothing is sent", firewall.Passage{Began: 100, Passed: 10}, 0},
		{"three are lost", firewall.Passage{Began: 103, Passed: 10}, 3},
		{"and two more", firewall.Passage{Began: 105, Passed: 10}, 5},
		{"refused by ourselves", firewall.Passage{Began: 107, Refused: 2, Passed: 10}, 5},
		{"nobody sends: still lost", firewall.Passage{Began: 107, Refused: 2, Passed: 10}, 5},
		{"one gets through", firewall.Passage{Began: 120, Refused: 2, Passed: 11}, 0},
		{"lost again", firewall.Passage{Began: 121, Refused: 2, Passed: 11}, 1},
		{"a table made anew", firewall.Passage{Began: 9}, 0},
		{"lost in that", firewall.Passage{Began: 10}, 1},
	} {
		if got := p.see(c.now); got != c.lost {
			t.Errorf("%s: %d lost, want %d", c.name, got, c.lost)
		}
	}
}

func TestBlocked(t *testing.T) {
	chains := func() ([]string, error) { return []string{"FORWARD of table ip filter (policy drop)"}, nil }
	if err := blocked(4, 4, chains); err != nil {
		t.Error(err)
	}
	err := blocked(7, 0, chains)
	if err == nil || !strings.Contains(err.Error(), "last 7 packets by which pods here begin a connection none got out; one of FORWARD of table ip filter (policy drop)") {
		t.Error(err)
	}
	if err := blocked(0, 5, chains); err == nil || !strings.Contains(err.Error(), "to pods here none got in") {
		t.Error(err)
	}
}
