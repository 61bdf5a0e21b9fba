package apiserver_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"meshd.dev/pkg/apiserver"
)

// childConfig names the variable with the configuration of a server that this
// test binary runs instead of tests.
const childConfig = "MESHD_TEST_APISERVER"

func TestMain(m *testing.M) {
	if text := os.Getenv(childConfig); text != "" {
		os.Exit(child(text))
	}
	os.Exit(m.Run())
}

// child serves until it is killed.
func child(text string) int {
	var cfg apiserver.Config
	if err := json.Unmarshal([]byte(text), &cfg); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	s, err := apiserver.New(ctx, cfg)
	if err == nil {
		err = s.Run(ctx)
	}
	fmt.Fprintln(os.Stderr, err)
	return 1
}

// TestPowerCut: what was acknowledged outlives a kill in the middle of writes.
func TestPowerCut(t *testing.T) {
	t.Parallel()
	ca, cfg := files(t)
	c := &cluster{t: t, ca: ca, cfg: cfg}
	client := kubernetes.NewForConfigOrDie(c.as("admin", "system:masters"))
	for round := range 2 {
		process := startChild(t, cfg)
		eventually(t, func() error {
			if code := client.Discovery().RESTClient().Get().AbsPath("/readyz").Do(t.Context()).Error(); code != nil {
				return code
			}
			return nil
		})
		acknowledged := make(chan string, 1000)
		for w := range 4 {
			go func() {
				for i := 0; ; i++ {
					name := fmt.Sprintf("m-%d-%d-%d", round, w, i)
					if _, err := client.CoreV1().ConfigMaps("default").Create(t.Context(), configMap(name), metav1.CreateOptions{}); err != nil {
						acknowledged <- ""
						return
					}
					acknowledged <- name
				}
			}()
		}
		var names []string
		for len(names) < 50 {
			if name := <-acknowledged; name != "" {
				names = append(names, name)
			}
		}
		if err := process.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = process.Wait()
		for ended := 0; ended < 4; {
			if name := <-acknowledged; name != "" {
				names = append(names, name)
			} else {
				ended++
			}
		}
		after := start(t, ca, cfg)
		for _, name := range names {
			if _, err := after.admin.CoreV1().ConfigMaps("default").Get(t.Context(), name, metav1.GetOptions{}); err != nil {
				t.Errorf("round %d: %s was acknowledged: %v", round, name, err)
			}
		}
		after.stop()
	}
}

func startChild(t *testing.T, cfg apiserver.Config) *exec.Cmd {
	t.Helper()
	text, err := json.Marshal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), childConfig+"="+string(text))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd
}
