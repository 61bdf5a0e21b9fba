package cni

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"unicode"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
)

// call is what a runtime wants of the plugin, as environment and standard input
// say it (the specification, section 2). The library's skel package does the
// same; what it brings along, regular expressions and Unicode's tables above
// all, makes a start of the plugin 0.2 ms longer, and an ADD takes six. A test
// compares the two.
type call struct {
	verb        string
	containerID string
	netns       string
	ifName      string
	args        string
	stdin       []byte
}

// verbs of the specification.
type verbs struct {
	add, del, check, gc, status func(*conf, *call) error
}

// versions of the specification that the plugin speaks, oldest first.
var versions = []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"}

// run does what is asked for. The conf that comes back is for the error, if one
// could be read.
func (v verbs) run(getenv func(string) string, stdin io.Reader, stdout io.Writer) (*conf, error) {
	c := &call{
		verb: getenv("CNI_COMMAND"), containerID: getenv("CNI_CONTAINERID"), netns: getenv("CNI_NETNS"),
		ifName: getenv("CNI_IFNAME"), args: getenv("CNI_ARGS"),
	}
	f, since, err := v.find(c)
	if err != nil {
		return nil, err
	}
	if c.verb == "VERSION" {
		return nil, version.PluginSupports(versions...).Encode(stdout)
	}
	if c.stdin, err = io.ReadAll(stdin); err != nil {
		return nil, types.NewError(types.ErrIOFailure, "cannot read standard input", err.Error())
	}
	conf, err := parseConf(c.stdin)
	if err != nil {
		return nil, err
	}
	at := slices.Index(versions, conf.CNIVersion)
	if at < 0 {
		return nil, types.NewError(types.ErrIncompatibleCNIVersion, "incompatible CNI versions",
			fmt.Sprintf("config is %.80q, plugin supports %q", conf.CNIVersion, versions))
	}
	if at < slices.Index(versions, since) {
		return conf, types.NewError(types.ErrIncompatibleCNIVersion, "config version does not allow "+c.verb, conf.CNIVersion+" is older than "+since)
	}
	return conf, f(conf, c)
}

// find gives a verb, and the version of the specification it came with, and
// looks at the variables that it needs.
func (v verbs) find(c *call) (f func(*conf, *call) error, since string, err error) {
	attachment := []variable{{"CNI_CONTAINERID", c.containerID, validID}, {"CNI_IFNAME", c.ifName, validIfName}}
	netns := variable{"CNI_NETNS", c.netns, nil}
	switch c.verb {
	case "ADD":
		return v.add, versions[0], need(append(attachment, netns)...)
	case "DEL":
		return v.del, versions[0], need(attachment...)
	case "CHECK":
		return v.check, "0.4.0", need(append(attachment, netns)...)
	case "GC":
		return v.gc, "1.1.0", nil
	case "STATUS":
		return v.status, "1.1.0", nil
	case "VERSION":
		return nil, "", nil
	case "":
		return nil, "", need(variable{name: "CNI_COMMAND"})
	}
	return nil, "", badVariable("CNI_COMMAND", fmt.Sprintf("%.80q is none of ADD, DEL, CHECK, GC, STATUS, VERSION", c.verb))
}

// variable of the environment.
type variable struct {
	name, value string
	valid       func(string) error // if a value can be wrong
}

func need(all ...variable) error {
	var missing []string
	for _, v := range all {
		if v.value == "" {
			missing = append(missing, v.name)
		} else if v.valid == nil {
			continue
		} else if err := v.valid(v.value); err != nil {
			return badVariable(v.name, err.Error())
		}
	}
	if len(missing) > 0 {
		return types.NewError(types.ErrInvalidEnvironmentVariables, "required environment variables are missing", strings.Join(missing, ", "))
	}
	return nil
}

func badVariable(name, why string) error {
	return types.NewError(types.ErrInvalidEnvironmentVariables, "invalid "+name, why)
}

// isName is what containers and networks may be called: a letter or digit, then
// letters, digits and any of _ . -
func isName(s string) bool {
	for i := range len(s) {
		c := s[i]
		alnum := c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
		if !alnum && (i == 0 || c != '_' && c != '.' && c != '-') {
			return false
		}
	}
	return s != ""
}

func validID(s string) error {
	if !isName(s) {
		return fmt.Errorf("%.200q: want a letter or digit, and then letters, digits and any of _ . -", s)
	}
	return nil
}

func validIfName(s string) error {
	if len(s) > 15 || s == "." || s == ".." || strings.ContainsFunc(s, func(r rune) bool { return r == '/' || r == ':' || unicode.IsSpace(r) }) {
		return fmt.Errorf("%.80q: want at most 15 bytes without / : and spaces", s)
	}
	return nil
}

// about is for people who start the plugin by hand.
func about(name string) {
	fmt.Fprintf(os.Stderr, "%s\nCNI protocol versions supported: %s\n", name, strings.Join(versions, ", "))
}
