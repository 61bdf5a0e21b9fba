package agent

import (
	"fmt"
	"syscall"
	"testing"

	v1 "k8s.io/api/core/v1"
)

func TestStory(t *testing.T) {
	l := newLab(t)
	stop := l.startAgent()
	l.create(pod("web", container("main", "http", "8080")))
	p := l.phase("web", v1.PodRunning)
	fmt.Println(p.Status)
	pid := l.pid("web", "main")
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	l.until("it is restarted", func() bool {
		return l.status("web", "main").RestartCount == 1 && l.status("web", "main").State.Running != nil
	})
	fmt.Println(l.get("web").Status)
	stop()
}
