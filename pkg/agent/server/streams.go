package server

import (
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"k8s.io/apimachinery/pkg/util/proxy"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// streams are the flags of exec and attach.
type streams struct{ stdin, stdout, stderr, tty bool }

func readStreams(q url.Values) (streams, error) {
	yes := func(names ...string) bool {
		for _, n := range names {
			if v := q.Get(n); v == "1" || v == "true" {
				return true
			}
		}
		return false
	}
	s := streams{stdin: yes("input", "stdin"), stdout: yes("output", "stdout"), stderr: yes("error", "stderr"), tty: yes("tty")}
	if s.tty {
		s.stderr = false // a terminal has one stream
	}
	if !s.stdin && !s.stdout && !s.stderr {
		return s, fmt.Errorf("one of input, output and error must be 1")
	}
	return s, nil
}

func (s *Server) exec(w http.ResponseWriter, r *http.Request) {
	st, err := readStreams(r.URL.Query())
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	c, err := s.cfg.Pods.Container(r.PathValue("ns"), r.PathValue("pod"), r.PathValue("container"), false)
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	at, err := s.cfg.Runtime.Exec(r.Context(), &cri.ExecRequest{
		ContainerId: c.ID, Cmd: r.URL.Query()["command"], Tty: st.tty, Stdin: st.stdin, Stdout: st.stdout, Stderr: st.stderr,
	})
	s.forward(w, r, at, err)
}

func (s *Server) attach(w http.ResponseWriter, r *http.Request) {
	st, err := readStreams(r.URL.Query())
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	c, err := s.cfg.Pods.Container(r.PathValue("ns"), r.PathValue("pod"), r.PathValue("container"), false)
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	at, err := s.cfg.Runtime.Attach(r.Context(), &cri.AttachRequest{
		ContainerId: c.ID, Tty: st.tty, Stdin: st.stdin, Stdout: st.stdout, Stderr: st.stderr,
	})
	s.forward(w, r, at, err)
}

func (s *Server) portForward(w http.ResponseWriter, r *http.Request) {
	id, err := s.cfg.Pods.SandboxID(r.PathValue("ns"), r.PathValue("pod"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	req := &cri.PortForwardRequest{PodSandboxId: id}
	for _, p := range r.URL.Query()["port"] {
		n, err := strconv.ParseUint(p, 10, 16)
		if err != nil || n == 0 {
			http.Error(w, fmt.Sprintf("port %q is not a number from 1 to 65535", p), http.StatusBadRequest)
			return
		}
		req.Port = append(req.Port, int32(n))
	}
	at, err := s.cfg.Runtime.PortForward(r.Context(), req)
	s.forward(w, r, at, err)
}

// forward hands the connection to the runtime's streaming server at the URL.
func (s *Server) forward(w http.ResponseWriter, r *http.Request, at string, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	u, err := url.Parse(at)
	if err != nil || u.Host == "" {
		http.Error(w, fmt.Sprintf("the runtime streams at %q, which is no URL", at), http.StatusInternalServerError)
		return
	}
	h := proxy.NewUpgradeAwareHandler(u, nil, false, true, responder{})
	h.ServeHTTP(w, r)
}

type responder struct{}

func (responder) Error(w http.ResponseWriter, _ *http.Request, err error) {
	http.Error(w, err.Error(), http.StatusBadGateway)
}

// runLimit bounds a command run without streams.
const runLimit = time.Minute

func (s *Server) run(w http.ResponseWriter, r *http.Request) {
	c, err := s.cfg.Pods.Container(r.PathValue("ns"), r.PathValue("pod"), r.PathValue("container"), false)
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	out, code, err := s.cfg.Runtime.ExecSync(r.Context(), c.ID, r.URL.Query()["cmd"], runLimit)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	if code != 0 {
		w.WriteHeader(http.StatusInternalServerError)
	}
	_, _ = w.Write(out)
}
